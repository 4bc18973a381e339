"""Arguments of any numeric type are taken, anything else is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_models import arguments as A

TENSOR = torch.zeros(1, 4, 8, 6)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: A.integer("n", np.int64(4), 4, 4), 4),
        (lambda: A.integer("n", torch.tensor(3)), 3),
        (lambda: A.integers("n", range(2)), (0, 1)),
        (lambda: A.integers("n", np.array(2)), (2,)),
        (lambda: A.number("x", np.float32(0.5), 0, 1), 0.5),
        (lambda: A.number("x", torch.tensor(2)), 2.0),
        (lambda: A.one_of("kind", "a", ("a", "b")), "a"),
        (lambda: A.chosen_steps(-1, 4), [3]),
        (lambda: A.chosen_steps([3, 0, 3, -4], 4), [0, 3]),
        (lambda: A.chosen_steps(slice(None, None, 2), 4), [0, 2]),
        (lambda: A.torch_device("cuda:1"), torch.device("cuda", 1)),
        (lambda: A.initial_latents(TENSOR, 1, 4, 2) is TENSOR, True),
        (lambda: A.shown(np.zeros((3, 4))), "an array of shape [3, 4] (float64)"),
        (lambda: A.shown("a\n" + 90 * "b", 5), "'a\\nb…"),
    ],
)
def test_values_of_every_type_are_taken(found, expected):
    assert found() == expected
    assert type(found()) is type(expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: A.integer("n", True), "n=True: give an integer"),
        (lambda: A.integer("n", 2.0), "n=2.0: give an integer"),
        (lambda: A.integer("n", torch.tensor([1])), r"n=a tensor of shape \[1\]"),
        (lambda: A.integer("n", 0, 1), "of at least 1"),
        (lambda: A.integer("n", 5, 1, 4), "from 1 to 4"),
        (lambda: A.number("x", "1"), "x='1': give a finite number"),
        (lambda: A.number("x", float("nan")), "finite"),
        (lambda: A.number("x", 2, 0, 1), "from 0 to 1"),
        (lambda: A.one_of("kind", 1, (True, "b")), "choose True or 'b'"),
        (lambda: A.chosen_steps(4, 4), "steps 0 to 3"),
        (lambda: A.chosen_steps([], 4), "steps 0 to 3"),
        (lambda: A.chosen_steps(slice("a"), 4), "slice of integers"),
        (lambda: A.mapping("metrics", {1: sum}, "functions"), "give a dict, name → functions"),
        (lambda: A.torch_device("gpu"), "give a device of torch"),
        (lambda: A.initial_latents(TENSOR[..., :5], 1, 4, 2), "multiples of 2"),
        (lambda: A.initial_latents(TENSOR / 0, 1, 4, 2), "not finite"),
        (lambda: A.token_ids(torch.tensor([[5]]), 5), "5"),
        (lambda: A.token_ids(torch.tensor([[0.5]]), 5), "integer token ids"),
    ],
)
def test_others_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
