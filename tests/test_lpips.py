"""LPIPS is its equation, reads the public files, and pulls where it should."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from daybreak import doctor
from daybreak.failure import BadRecipe
from daybreak.objective import lpips


@pytest.fixture
def config(toys: dict[str, Path]) -> lpips.Config:
    return lpips.Config(vgg=str(toys["vgg"]), heads=str(toys["heads"]))


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 2, 3, 48, 32, generator=generator) * 2 - 1
    return one, other


def written_out(config: lpips.Config, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """LPIPS as the paper and torchvision's list of layers have it, one picture at a time."""
    weights = torch.load(str(config.vgg), weights_only=True)
    heads = torch.load(str(config.heads), weights_only=True)
    layers: list[nn.Module] = []
    for channels in (2, 2, "pool", 2, 2, "pool", 3, 3, 3, "pool", 3, 3, 3, "pool", 3, 3, 3):
        if channels == "pool":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        kernel = weights[f"features.{len(layers)}.weight"]
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
        conv.load_state_dict({"weight": kernel, "bias": weights[f"features.{len(layers)}.bias"]})
        layers += [conv, nn.ReLU()]
    wanted = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    answers = []
    for one, two in zip(x, y, strict=True):
        total = torch.zeros(())
        a, b = (one[None] - shift) / scale, (two[None] - shift) / scale
        for number, layer in enumerate(layers):
            a, b = layer(a), layer(b)
            if number in wanted:
                unit_a = a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10)
                unit_b = b / (b.square().sum(1, keepdim=True).sqrt() + 1e-10)
                head = heads[f"lin{wanted.index(number)}.model.1.weight"]
                total = total + nn.functional.conv2d((unit_a - unit_b).square(), head).mean()
        answers.append(total)
    return torch.stack(answers)


def test_it_is_the_equation_written_out(config: lpips.Config) -> None:
    x, y = pictures()
    torch.testing.assert_close(
        lpips.distance(lpips.load(config), x, y), written_out(config, x, y), rtol=1e-5, atol=1e-7
    )


def test_it_is_the_value_of_the_package(toys: dict[str, Path], tmp_path: Path) -> None:
    try:
        package = importlib.import_module("lpips")
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        pytest.skip(f"{error}")
    torch.manual_seed(0)
    trunk = models.vgg16(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "vgg16.pth")
    theirs = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for part in theirs.net.children():
        for number, layer in part.named_children():
            layer.load_state_dict(trunk.features[int(number)].state_dict())
    ours = lpips.load(lpips.Config(vgg=str(tmp_path / "vgg16.pth")))
    x, y = pictures()
    torch.testing.assert_close(
        lpips.distance(ours, x, y), theirs(x, y).flatten(), rtol=1e-4, atol=1e-6
    )


def test_a_perfect_guess_is_at_distance_zero_and_feels_no_pull(config: lpips.Config) -> None:
    x, _ = pictures()
    guess = x.clone().requires_grad_()
    miss = lpips.distance(lpips.load(config), guess, x, 0.5)
    miss.sum().backward()
    assert torch.equal(miss, torch.zeros(2))
    assert guess.grad is not None
    assert not guess.grad.any()


def test_following_the_gradient_comes_nearer_and_the_truth_has_none(config: lpips.Config) -> None:
    vgg = lpips.load(config)
    guess, truth = (picture.requires_grad_() for picture in pictures())
    before = lpips.distance(vgg, guess, truth, 0.5)
    before.sum().backward()
    assert truth.grad is None
    assert guess.grad is not None
    step = guess - 0.5 * guess.grad / guess.grad.abs().amax()
    assert (lpips.distance(vgg, step, truth, 0.5) < before).all()


def test_a_place_that_is_dead_in_all_channels_gives_no_nan(config: lpips.Config) -> None:
    vgg = lpips.load(config)
    dead = tuple(tuple((kernel, bias - 1e4) for kernel, bias in depth) for depth in vgg.depths)
    x, y = pictures()
    x.requires_grad_()
    lpips.distance(vgg._replace(depths=dead), x, y).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_resized_picture_is_seen_smaller_but_never_too_small(config: lpips.Config) -> None:
    vgg = lpips.load(config)
    x, y = pictures()
    half = [nn.functional.interpolate(p, (24, 16), mode="bilinear", antialias=True) for p in (x, y)]
    torch.testing.assert_close(
        lpips.distance(vgg, x, y, 0.5), lpips.distance(vgg, half[0], half[1])
    )
    x, y = x[..., :16, :16], y[..., :16, :16]
    torch.testing.assert_close(lpips.distance(vgg, x, y, 0.5), lpips.distance(vgg, x, y))


def test_the_convolutions_are_those_of_torchvision(toys: dict[str, Path]) -> None:
    named = torch.load(toys["vgg"], weights_only=True)
    numbers = sorted({int(re.findall(r"\d+", name)[0]) for name in named})
    assert numbers == [number for depth in lpips.CONVOLUTIONS for number in depth]


@pytest.mark.slow
@pytest.mark.skipif(doctor.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_is_the_same_distance_with_the_same_gradient(
    config: lpips.Config, dtype: torch.dtype
) -> None:
    x, y = pictures()
    x[0] = -1.0  # places that are dead in all channels
    found = []
    plain = lpips.load(config, dtype)
    for vgg in (plain, lpips.compiled(plain)):
        guess = x.clone().requires_grad_()
        miss = lpips.distance(vgg, guess, y, 0.5)
        miss.sum().backward()
        found.append((miss.detach(), guess.grad))
    torch.testing.assert_close(*(miss for miss, _ in found))
    torch.testing.assert_close(*(gradient for _, gradient in found), atol=1e-4, rtol=0.01)


def test_its_weights_are_values_and_no_parameters(config: lpips.Config) -> None:
    vgg = lpips.load(config)
    tensors = [tensor for depth in vgg.depths for pair in depth for tensor in pair]
    assert not any(tensor.requires_grad for tensor in (*tensors, *vgg.heads))
    assert not any(isinstance(tensor, nn.Parameter) for tensor in (*tensors, *vgg.heads))


def test_both_formats_of_the_file_are_read(config: lpips.Config, tmp_path: Path) -> None:
    save_file(torch.load(str(config.vgg), weights_only=True), tmp_path / "vgg16.safetensors")
    other = lpips.load(config.model_copy(update={"vgg": str(tmp_path / "vgg16.safetensors")}))
    x, y = pictures()
    torch.testing.assert_close(
        lpips.distance(other, x, y), lpips.distance(lpips.load(config), x, y)
    )


def test_a_missing_network_says_what_to_fetch_and_where_to_put_it(
    config: lpips.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(BadRecipe, match=r"download\.pytorch\.org.*528 MiB") as caught:
        lpips.load(config.model_copy(update={"vgg": None}))
    assert str(place) in str(caught.value)
    assert "--set lpips.vgg=FILE" in str(caught.value)
    place.parent.mkdir(parents=True)
    place.symlink_to(str(config.vgg))
    lpips.load(config.model_copy(update={"vgg": None}))


def test_the_size_that_is_named_is_that_of_vgg_16() -> None:
    convolutions = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)]
    convolutions += [(256, 512), *[(512, 512)] * 5]
    dense = [(512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)]
    weights = sum(9 * a * b + b for a, b in convolutions) + sum(a * b + b for a, b in dense)
    assert round(4 * weights / 2**20) == 528


def test_missing_heads_say_how_to_get_them(config: lpips.Config, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"pip install --no-deps lpips .*--set lpips\.heads=FILE"):
        lpips.load(config.model_copy(update={"heads": str(tmp_path / "nowhere.pth")}))


def test_without_a_place_named_both_files_are_where_their_publishers_put_them(
    toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    package = tmp_path / "site" / "lpips"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it needs torchvision')")
    monkeypatch.syspath_prepend(package.parent)
    assert lpips.files(lpips.Config()) == (
        tmp_path / ".cache" / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth",
        package / "weights" / "v0.1" / "vgg.pth",
    )

    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nor is the package installed
    with pytest.raises(BadRecipe, match=r"lpips\.heads: the package lpips does not exist"):
        lpips.load(lpips.Config(vgg=str(toys["vgg"])))


def test_activations_are_compared_in_float32_whatever_they_come_in(config: lpips.Config) -> None:
    guess, truth = torch.rand(2, 3, 20, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = lpips.apart(torch.ones(8), guess.float(), truth.float())
    assert torch.equal(lpips.apart(torch.ones(8), guess, truth), exact)
    half, full = lpips.load(config, torch.bfloat16), lpips.load(config)
    assert {t.dtype for depth in half.depths for pair in depth for t in pair} == {torch.bfloat16}
    for one, other in zip(half.heads, full.heads, strict=True):
        assert torch.equal(one, other)


class Harm:
    """What a file of weights must not be able to do: here, to make another file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.place,)


def test_a_file_of_weights_is_read_as_data_and_never_run(
    config: lpips.Config, tmp_path: Path
) -> None:
    torch.save({"features.0.weight": Harm(tmp_path / "harm")}, tmp_path / "vgg16.pth")
    with pytest.raises(BadRecipe, match="cannot be read as weights"):
        lpips.load(config.model_copy(update={"vgg": str(tmp_path / "vgg16.pth")}))
    assert not (tmp_path / "harm").exists()


def test_a_damaged_file_of_safetensors_is_refused_too(config: lpips.Config, tmp_path: Path) -> None:
    page = tmp_path / "vgg16.safetensors"
    page.write_text("<html>404</html>")
    with pytest.raises(BadRecipe, match=r"lpips\.vgg: .*cannot be read as weights"):
        lpips.load(config.model_copy(update={"vgg": str(page)}))


def test_files_of_another_kind_are_refused(config: lpips.Config, tmp_path: Path) -> None:
    page = tmp_path / "vgg16.pth"
    page.write_text("<html>404</html>")
    with pytest.raises(BadRecipe, match=r"lpips\.vgg: .*cannot be read as weights") as caught:
        lpips.load(config.model_copy(update={"vgg": str(page)}))
    assert "\n" not in str(caught.value)
    page.write_bytes(b"")
    with pytest.raises(BadRecipe, match=r"as weights \(EOFError\)"):
        lpips.load(config.model_copy(update={"vgg": str(page)}))
    page.write_bytes(Path(str(config.vgg)).read_bytes()[:1000])
    with pytest.raises(BadRecipe, match="cannot be read as weights"):
        lpips.load(config.model_copy(update={"vgg": str(page)}))
    with pytest.raises(BadRecipe, match=r"not torchvision's VGG-16.*features\.0\.weight"):
        lpips.load(config.model_copy(update={"vgg": str(config.heads)}))
    heads = {f"lin{depth}.model.1.weight": torch.ones(1, 7, 1, 1) for depth in range(5)}
    torch.save(heads, tmp_path / "heads.pth")
    with pytest.raises(BadRecipe, match=r"does not fit .*\[8, 16, 32, 32, 32\] channels"):
        lpips.load(config.model_copy(update={"heads": str(tmp_path / "heads.pth")}))
