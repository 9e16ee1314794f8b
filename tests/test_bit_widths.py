"""Bits of each layer within a size: against every choice that there is; and what "1.5 MB" is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY

from lightning_quant import ConfigError
from lightning_quant.tuning import bit_widths
from lightning_quant.tuning.bit_widths import WeightCosts, choose_bits, least_size
from lightning_quant.tuning.size import bytes_of


@st.composite
def problems(draw: st.DrawFn) -> list[WeightCosts]:
    layers = []
    for number in range(draw(st.integers(1, 6))):
        widths = draw(st.sets(st.sampled_from([8, 4, 3, 2]), min_size=1))
        sizes = {width: draw(st.integers(0, 40)) for width in widths}
        noises = {width: float(draw(st.integers(0, 30))) for width in widths}
        layers.append(WeightCosts(name=f"layer{number}", sizes=sizes, noises=noises))
    return layers


def every_choice(layers: list[WeightCosts]) -> list[tuple[int, float]]:
    """(size, noise) of each."""
    return [
        (
            sum(layer.sizes[width] for layer, width in zip(layers, widths, strict=True)),
            sum(layer.noises[width] for layer, width in zip(layers, widths, strict=True)),
        )
        for widths in itertools.product(*(layer.sizes for layer in layers))
    ]


def summed(layers: list[WeightCosts], bits: dict[str, int]) -> tuple[int, float]:
    return sum(x.sizes[bits[x.name]] for x in layers), sum(x.noises[bits[x.name]] for x in layers)


@PROPERTY
@given(problems(), st.integers(0, 200))
def test_the_least_noise_of_all_choices_that_fit(layers: list[WeightCosts], bound: int) -> None:
    chosen = choose_bits(layers, bound)
    assert list(chosen) == [layer.name for layer in layers]
    size, noise = summed(layers, chosen)
    fitting = [other for other_size, other in every_choice(layers) if other_size <= bound]
    if fitting:
        assert size <= bound
        assert noise == min(fitting)  # sums of whole numbers are exact
    else:
        smallest = least_size(layers)
        assert size == smallest == min(other for other, _ in every_choice(layers))
        assert noise == min(other for other_size, other in every_choice(layers) if other_size == smallest)


@PROPERTY
@given(problems(), st.integers(0, 200), st.integers(1, 5))
def test_with_few_sums_it_still_fits(layers: list[WeightCosts], bound: int, most: int) -> None:
    before = bit_widths._MOST_SUMS
    bit_widths._MOST_SUMS = most
    try:
        size, _ = summed(layers, choose_bits(layers, bound))
    finally:
        bit_widths._MOST_SUMS = before
    assert size <= max(bound, least_size(layers))


def test_a_hundred_layers() -> None:
    """Sizes and noises of all magnitudes: within the bound, and nearly all of it is used."""
    layers = [
        WeightCosts(name=str(n), sizes={8: 1000 + 7919 * n % 100_003, 4: (1000 + 7919 * n % 100_003) // 2},
                    noises={8: 1e-6 / (n + 1), 4: 1e-4 / (n + 1)})
        for n in range(100)
    ]  # fmt: skip
    bound = int(0.7 * sum(layer.sizes[8] for layer in layers))
    size, _ = summed(layers, choose_bits(layers, bound))
    assert 0.99 * bound < size <= bound


def test_of_equal_choices_the_most_bits() -> None:
    layers = [WeightCosts(name="a", sizes={4: 5, 8: 5}, noises={4: 1.0, 8: 1.0})]
    assert choose_bits(layers, 5) == {"a": 8}


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5 MB", 1_500_000), ("200kB", 200_000), (" 3 KiB ", 3072), ("0.5 GiB", 2**29), ("7 B", 7), ("1 MiB", 2**20)],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "1500000", "0.15", "1.5 Mb", "-1 MB", "0 MB", "1,5 MB", 1500000, 0.15, None])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bytes_of(text)
    assert str(caught.value) == (
        f"max_size={text!r}: give a number and a unit, B, kB, MB, GB, KiB, MiB, GiB, such as '1.5 MB': the size of a "
        "file."
    )
