"""Teachers see what they saw when they learned, at the right places, and never change."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from daybreak.failure import BadRecipe
from daybreak.model import vision

KINDS = ("dinov2", "dinov2_with_registers", "dinov3")
EXTRA = {"dinov2": 1, "dinov2_with_registers": 5, "dinov3": 5}  # class and register tokens


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(toys: dict[str, Path], kind: str) -> None:
    import transformers

    name = {"dinov2": "Dinov2Model", "dinov3": "DINOv3ViTModel"}.get(
        kind, "Dinov2WithRegistersModel"
    )
    network = getattr(transformers, name).from_pretrained(toys[kind]).eval()
    teacher = vision.load(str(toys[kind]), "repa.teacher")
    image = noise(2, 3, 3 * teacher.patch, 5 * teacher.patch)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        whole = network(pixel_values=(image * 0.5 + 0.5 - mean) / deviation).last_hidden_state
        features = teacher(image, 3, 5)
    assert whole.shape == (2, EXTRA[kind] + 15, teacher.width)
    torch.testing.assert_close(features, whole[:, EXTRA[kind] :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_feature_speaks_of_its_own_square_of_the_picture(
    toys: dict[str, Path], kind: str
) -> None:
    teacher = vision.load(str(toys[kind]), "repa.teacher")
    rows, columns, side = 3, 5, 32
    pictures = torch.zeros(1 + rows * columns, 3, rows * side, columns * side)
    for place in range(rows * columns):
        top, left = side * (place // columns), side * (place % columns)
        pictures[1 + place, :, top : top + side, left : left + side] = noise(3, side, side)
    with torch.no_grad():
        features = teacher(pictures, rows, columns)
    change = (features[1:] - features[:1]).norm(dim=-1)
    assert change.argmax(1).tolist() == list(range(rows * columns))


def test_a_picture_that_moves_by_a_square_takes_its_features_along(toys: dict[str, Path]) -> None:
    teacher = vision.load(str(toys["dinov3"]), "repa.teacher")
    picture = noise(1, 3, 64, 128)
    with torch.no_grad():
        still, moved = (
            teacher(shown, 4, 8).unflatten(1, (4, 8))
            for shown in (picture, picture.roll(16, dims=3))
        )
    right = nn.functional.cosine_similarity(still[:, :, :-1], moved[:, :, 1:], dim=-1).mean()
    wrong = nn.functional.cosine_similarity(still, moved, dim=-1).mean()
    assert right > wrong + 0.2


def test_scaling_down_counts_every_pixel() -> None:
    board = torch.ones(1, 3, 64, 64)
    board[..., ::2, ::2] = -1
    board[..., 1::2, 1::2] = -1
    board.requires_grad_()
    small = vision.resize(board, 16, 16)
    assert small.abs().max() < 0.01  # by nearest neighbour it would be -1 everywhere
    small.sum().backward()
    assert board.grad is not None
    assert board.grad.min() > 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(((64, 64), (32, 32)), ((64, 48), (37, 29)), ((51, 33), (17, 33)), ((33, 51), (33, 8))),
        *(((16, 24), (32, 56)), ((17, 9), (40, 31)), ((40, 9), (13, 31)), ((5, 7), (1, 1))),
        *(((256, 224), (126, 112)), ((3, 1), (9, 4))),
    ],
    ids=str,
)
def test_scaling_is_that_of_interpolate_and_so_is_its_gradient(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    ours, theirs = noise(2, 3, *before).requires_grad_(), noise(2, 3, *before).double()
    theirs.requires_grad_()  # in float32 its filters are rounded, and it misses by 1e-5 itself
    small = vision.resize(ours, *after)
    exact = nn.functional.interpolate(theirs, after, mode="bilinear", antialias=True)
    torch.testing.assert_close(small.double(), exact, rtol=0, atol=2e-6)
    pull = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    small.backward(pull)
    exact.backward(pull.double())
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=5e-6)


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    picture = noise(1, 3, 16, 24)
    assert vision.resize(picture, 16, 24) is picture


def test_gradient_passes_to_the_picture_and_stops_there(toys: dict[str, Path]) -> None:
    teacher = vision.load(str(toys["dinov2"]), "dino.teacher")
    picture = noise(1, 3, 32, 32).requires_grad_()
    teacher(picture, 2, 2).square().sum().backward()
    assert picture.grad is not None
    assert picture.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
    assert not vision.Teacher(teacher.network.train()).network.training


@pytest.mark.slow  # the compiler is asked
@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_compiled_it_sees_the_same_at_any_size(toys: dict[str, Path], kind: str) -> None:
    plain, compiled = (vision.load(str(toys[kind]), "dino.teacher") for _ in range(2))
    compiled.compile()
    torch._dynamo.utils.counters.clear()
    for rows, columns in ((2, 2), (3, 4), (5, 3)):
        image = torch.rand(2, 3, 32, 48).mul(2).sub(1).requires_grad_()
        seen, wanted = (teacher(image, rows, columns) for teacher in (compiled, plain))
        torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)
        ours, theirs = (torch.autograd.grad(y.square().sum(), image)[0] for y in (seen, wanted))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "layers share their code"


def test_whoever_holds_a_teacher_does_not_own_its_weights(toys: dict[str, Path]) -> None:
    holder = nn.Linear(1, 1)
    holder.teacher = vision.load(str(toys["dinov2"]), "dino.teacher")  # type: ignore[assignment]
    assert set(holder.state_dict()) == {"weight", "bias"}


def test_colours_that_no_picture_has_are_cut_off(toys: dict[str, Path]) -> None:
    teacher = vision.load(str(toys["dinov2"]), "dino.teacher")
    picture = 3 * noise(1, 3, 28, 28)
    torch.testing.assert_close(teacher(picture, 2, 2), teacher(picture.clamp(-1, 1), 2, 2))


def test_no_pictures_have_no_features(toys: dict[str, Path]) -> None:
    teacher = vision.load(str(toys["dinov2"]), "dino.teacher")
    assert teacher(torch.zeros(0, 3, 32, 32), 2, 2).shape == (0, 4, teacher.width)


def test_half_precision_is_near(toys: dict[str, Path]) -> None:
    exact = vision.load(str(toys["dinov3"]), "repa.teacher")
    half = vision.load(str(toys["dinov3"]), "repa.teacher", torch.bfloat16)
    features = half(noise(1, 3, 32, 32), 2, 2)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, exact(noise(1, 3, 32, 32), 2, 2), rtol=0, atol=0.1)


def test_a_teacher_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"repa\.teacher = .*nowhere.*--without repa") as caught:
        vision.load(str(tmp_path / "nowhere"), "repa.teacher")
    assert "\n" not in str(caught.value)


def test_a_network_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(BadRecipe, match=r"dino\.teacher = .* is a vit, not one of dinov2"):
        vision.load(str(tmp_path), "dino.teacher")


def test_a_teacher_without_all_its_weights_is_refused(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(toys["dinov2"], folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadRecipe, match=r"lacks weights \(layernorm\.weight, \.\.\.\)"):
        vision.load(str(folder), "repa.teacher")
    (folder / "model.safetensors").write_bytes(b"a page that says 404")
    with pytest.raises(BadRecipe, match=r"repa\.teacher"):
        vision.load(str(folder), "repa.teacher")


class Gate(BaseHTTPRequestHandler):
    """A hub that wants a licence to be accepted first."""

    def do_HEAD(self) -> None:
        body = b'{"error": "Access to this model is restricted."}'
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        """Stay silent."""


ASK = "from daybreak.model import vision; vision.load('some/teacher', 'repa.teacher')"


def test_a_gated_teacher_says_how_to_be_let_in(tmp_path: Path) -> None:
    hub = HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    hub.shutdown()
    hub.server_close()
    last = done.stderr.strip().splitlines()[-1]
    assert "repa.teacher = 'some/teacher' is gated: accept its licence" in last, done.stderr
    assert "hf auth login" in last
