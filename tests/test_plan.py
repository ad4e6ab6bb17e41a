"""The plan: every picture in its turn, every batch of one shape, whoever asks and from wherever."""

import math
from collections import Counter
from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from daybreak.data import plan
from daybreak.data.buckets import Bucket, buckets, cropped
from daybreak.data.plan import MOST_CUT, Plan, Shelf

SHAPES = buckets(512, 32, 2.0)
COUNTS = st.lists(st.integers(1, 90), min_size=1, max_size=5)
BATCHES = st.integers(1, 20)


def shelves(*counts: int) -> list[Shelf]:
    """One dataset, with so many pictures in the first buckets."""
    starts = np.cumsum([0, *counts])
    return [
        Shelf(SHAPES[number], (np.arange(starts[number], starts[number + 1]),), (1.0,))
        for number in range(len(counts))
    ]


def mixed(counts: list[int], weights: list[float], buckets_each: int) -> list[Shelf]:
    """Several datasets, the pictures of each dealt to the same buckets."""
    starts = np.cumsum([0, *counts])
    shares = plan.rates(counts, weights)
    return [
        Shelf(
            SHAPES[number],
            tuple(
                np.arange(starts[i] + number, starts[i + 1], buckets_each)
                for i in range(len(counts))
            ),
            shares,
        )
        for number in range(buckets_each)
    ]


def as_lists(planned: list[plan.Planned]) -> list[tuple[Bucket, list[int]]]:
    return [(bucket, rows.tolist()) for bucket, rows in planned]


@settings(deadline=None)
@given(COUNTS, BATCHES, st.integers(0, 2**63))
def test_after_any_epoch_the_pictures_of_a_bucket_were_seen_equally_often(
    counts: list[int], batch: int, seed: int
) -> None:
    made = Plan(shelves(*counts), batch, seed)
    seen = Counter[int]()
    for epoch in range(4):
        for bucket, rows in made.epoch(epoch):
            assert len(rows) == batch
            place = next(shelf for shelf in made.shelves if shelf.bucket == bucket)
            assert set(rows.tolist()) <= set(place.rows[0].tolist())
            seen.update(rows.tolist())
        for shelf in made.shelves:
            often = {seen[row] for row in shelf.rows[0].tolist()}
            assert max(often) - min(often) <= 1
            assert max(often) <= epoch + 1


def test_where_batches_come_out_even_an_epoch_is_a_shuffle() -> None:
    made = Plan(shelves(24, 40, 8), batch=8, seed=0)
    epochs = [as_lists(made.epoch(number)) for number in range(3)]
    for epoch in epochs:
        assert sorted(row for _, rows in epoch for row in rows) == list(range(72))
    assert epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None)
@given(COUNTS, BATCHES, st.integers(0, 200))
def test_a_batch_is_found_without_those_before_it(
    counts: list[int], batch: int, number: int
) -> None:
    asked = Plan(shelves(*counts), batch, seed=7)
    epoch, place = asked.locate(number)
    assert asked.before(epoch) <= number < asked.before(epoch + 1)
    assert len(asked[number + 50].rows) == batch  # and after one of a later epoch
    bucket, rows = asked[number]
    gone_through = [one for past in range(epoch + 1) for one in asked.epoch(past)]
    assert gone_through[number].bucket == bucket
    assert gone_through[number].rows.tolist() == rows.tolist()
    assert as_lists([Plan(shelves(*counts), batch, seed=7)[number]]) == as_lists(
        [asked.epoch(epoch)[place]]
    )


def test_the_millionth_batch_is_found_at_once() -> None:
    made = Plan(shelves(1000, 300, 70), batch=64, seed=0)
    number = 1_000_000_000
    epoch, _ = made.locate(number)
    assert abs(epoch - number * 64 / 1370) < 2
    assert len(made[number].rows) == 64


def test_the_plan_is_the_recorded_one() -> None:
    """Who continues a run begun with an older version meets the same pictures."""
    made = Plan(shelves(5, 9, 2), batch=4, seed=11)
    assert [(bucket.name, rows.tolist()) for bucket, rows in (made[n] for n in range(4, 8))] == [
        ("352x704", [3, 0, 2, 4]),
        ("384x640", [5, 11, 6, 7]),
        ("384x640", [8, 10, 12, 13]),
        ("384x640", [10, 9, 12, 7]),
    ]
    both = Plan(mixed([6, 20], [1.0, 1.0], buckets_each=1), batch=13, seed=11)
    assert both[2].rows.tolist() == [18, 24, 6, 15, 5, 5, 2, 18, 3, 21, 5, 2, 1]


def test_another_seed_is_another_order() -> None:
    one, other = (Plan(shelves(40, 40), 8, seed).epoch(0) for seed in (0, 1))
    assert as_lists(one) != as_lists(other)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(6, 60), st.floats(0.1, 5)), min_size=2, max_size=3), BATCHES)
def test_datasets_are_mixed_by_weight_in_every_bucket(
    datasets: list[tuple[int, float]], batch: int
) -> None:
    counts, weights = [count for count, _ in datasets], [weight for _, weight in datasets]
    made = Plan(mixed(counts, weights, buckets_each=3), batch, seed=3)
    epochs = 12
    seen = Counter[int]()
    for epoch in range(epochs):
        for _, rows in made.epoch(epoch):
            seen.update(rows.tolist())
    for shelf in made.shelves:
        for rows, rate in zip(shelf.rows, shelf.rates, strict=True):
            due = epochs * rate * len(rows)
            had = sum(seen[row] for row in rows.tolist())
            # What is not yet a batch is still owed, and one sample may be rounded away.
            assert due - batch - 1 <= had <= due + 1
            often = [seen[row] for row in rows.tolist()]
            owed = min(batch - 1, math.ceil(rate) + 1)  # a picture, in the samples still owed
            assert max(often) - min(often) <= 1 + owed


def test_in_every_pass_datasets_take_turns_anew() -> None:
    made = Plan(mixed([24, 24], [1.0, 1.0], buckets_each=1), batch=48, seed=3)
    turns = [(made[number].rows < 24).tolist() for number in range(3)]
    assert turns[0] != turns[1] != turns[2]


def test_shares_are_those_of_the_weights_and_an_epoch_is_as_long_as_all_datasets() -> None:
    counts = [1000, 50]
    passes = plan.rates(counts, [0.25, 0.75])
    shares = [count * rate for count, rate in zip(counts, passes, strict=True)]
    assert shares == [262.5, 787.5]


def test_a_picture_of_a_dataset_with_little_weight_still_has_its_turn() -> None:
    made = Plan(mixed([200, 4], [0.99, 0.01], buckets_each=2), 8, seed=0)
    seen = {row for epoch in range(12) for _, rows in made.epoch(epoch) for row in rows.tolist()}
    assert {200, 201, 202, 203} <= seen


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(SHAPES), st.integers(1, 40), min_size=1), BATCHES)
def test_small_buckets_join_or_stand_alone_by_the_rule(
    pictures: dict[Bucket, int], batch: int
) -> None:
    home = plan.settle(pictures, batch)
    assert home.keys() == pictures.keys()
    held = Counter[Bucket]()
    for bucket, to in home.items():
        assert home[to] == to
        assert cropped(to, *bucket) <= MOST_CUT
        held[to] += pictures[bucket]
    for to, number in held.items():
        if number < batch:
            members = [bucket for bucket in home if home[bucket] == to]
            assert all(
                max(cropped(other, *one) for one in members) > MOST_CUT
                or other != min(held.keys() - {to}, key=lambda one: cropped(one, *to))
                for other in held.keys() - {to}
            )


def test_a_bucket_that_fills_a_batch_stays_where_it_is() -> None:
    full = dict.fromkeys(SHAPES, 8)
    assert plan.settle(full, 8) == {shape: shape for shape in SHAPES}


def test_the_smallest_joins_its_neighbour_and_the_lonely_stays() -> None:
    square, wide, wider, tall = (
        Bucket.named(name) for name in ("512x512", "384x672", "352x704", "704x352")
    )
    home = plan.settle({square: 100, wide: 20, wider: 3, tall: 5}, batch=16)
    assert home == {square: square, wide: wide, wider: wide, tall: tall}


def test_a_bucket_that_stands_alone_gives_a_batch_once_in_a_while() -> None:
    made = Plan(shelves(64, 3), batch=16, seed=0)
    lonely = [
        rows.tolist()
        for epoch in range(16)
        for bucket, rows in made.epoch(epoch)
        if bucket == SHAPES[1]
    ]
    assert len(lonely) == 3  # 48 samples of three pictures in 16 epochs
    assert Counter(chain.from_iterable(lonely)) == {64: 16, 65: 16, 66: 16}


def test_who_has_joined_a_bucket_moves_on_with_it() -> None:
    narrow, middle, square = Bucket(320, 416), Bucket(352, 416), Bucket(384, 416)
    home = plan.settle({narrow: 1, middle: 2, square: 100}, batch=16)
    assert home == dict.fromkeys((narrow, middle, square), square)


def test_of_two_small_buckets_the_smaller_joins_the_larger() -> None:
    few, more = Bucket(352, 704), Bucket(384, 672)
    assert plan.settle({few: 3, more: 10}, batch=12) == {few: more, more: more}


def test_a_bucket_that_another_has_filled_moves_no_more() -> None:
    few, more, many = Bucket(352, 704), Bucket(384, 672), Bucket(384, 640)
    assert plan.settle({few: 5, more: 7, many: 50}, batch=12) == {few: more, more: more, many: many}
    assert plan.settle({few: 5, more: 7, many: 50}, batch=13) == dict.fromkeys(
        (few, more, many), many
    )


def test_a_quarter_may_be_cut_and_no_more() -> None:
    square, exactly, beyond = Bucket(512, 512), Bucket(512, 384), Bucket(512, 352)
    assert cropped(square, *exactly) == MOST_CUT
    assert plan.settle({square: 100, exactly: 3}, batch=16)[exactly] == square
    assert plan.settle({square: 100, beyond: 3}, batch=16)[beyond] == beyond


def test_the_first_batches_are_found_where_every_bucket_stands_alone() -> None:
    """An epoch lacks a batch of each bucket then, so the first batches come after several."""
    lonely = [Shelf(Bucket(16, 16 * one), (np.array([one]),), (1.0,)) for one in range(1, 51)]
    made = Plan(lonely, batch=8, seed=0)
    assert [made.locate(number) for number in (0, 49, 50)] == [(7, 0), (7, 49), (15, 0)]
    assert len({made[number].bucket for number in range(50)}) == 50
