"""Arguments of one call of a transformer, by hand."""

from __future__ import annotations

import torch

from hooked_models.generation.pipeline_inputs import Bound

ROWS = 3


def bound(**more: torch.Tensor) -> Bound:
    text = torch.arange(ROWS * 2.0).view(ROWS, 2, 1)
    ids = torch.arange(9).view(3, 3)
    return Bound({"encoder_hidden_states": text, "ids": ids, "scale": 2.0, **more}, ROWS)


def test_rows_are_taken_from_all_that_has_rows():
    one = bound()
    some = one.take(torch.tensor([2, 0]))
    text = one.arguments["encoder_hidden_states"]
    assert some.rows == 2
    assert torch.equal(some.arguments["encoder_hidden_states"], text[[2, 0]])
    assert some.arguments["ids"] is one.arguments["ids"]


def test_latents_go_in_by_their_name_and_a_list_comes_back_stacked():
    latents = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))

    def double(hidden_states, encoder_hidden_states, ids, scale):
        if isinstance(hidden_states, list):
            return ([scale * row for row in hidden_states],)
        return (scale * hidden_states,)

    plain, listed = bound(), Bound(bound().arguments, ROWS, listed=True)
    assert torch.equal(plain.call(double, latents), 2 * latents)
    assert torch.equal(listed.call(double, latents), 2 * latents)


def test_a_text_for_all_rows_becomes_one_a_row_and_others_stay():
    text = torch.ones(1, 2, 5)
    one = bound(encoder_hidden_states_2=text, guidance=torch.ones(1, 1))
    whole = one.expanded().arguments
    assert whole["encoder_hidden_states_2"].shape == (ROWS, 2, 5)
    assert whole["guidance"].shape == (1, 1)
    assert whole["encoder_hidden_states"] is one.arguments["encoder_hidden_states"]


def test_the_text_begins_a_graph_of_its_own():
    one = bound()
    text = one.opened("encoder_hidden_states").arguments["encoder_hidden_states"]
    assert text.requires_grad
    assert text.is_leaf
    assert not one.arguments["encoder_hidden_states"].requires_grad
