"""What counts as a prompt: text or token ids, of Python, NumPy or torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from duoserve.errors import RequestError
from duoserve.text.prompts import as_token_ids, is_one


@pytest.mark.parametrize("ids", [[5, 7], (5, 7), range(5, 8, 2), np.array([5, 7]), torch.tensor([5, 7])], ids=type)
def test_integers_of_any_kind_are_token_ids(ids: Any) -> None:
    assert is_one(ids)
    found = as_token_ids(ids)
    assert found == [5, 7] and all(type(one) is int for one in found)


@pytest.mark.parametrize("prompts", [["a", "b"], np.array(["a", "b"]), [[5], [7]], np.array([[5], [7]])], ids=type)
def test_texts_and_lists_of_ids_are_several_prompts(prompts: Any) -> None:
    assert not is_one(prompts)


WRONG = [b"ab", [True, False], [5, True], np.array([True]), torch.tensor([True]), [5.0], 5, None]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_prompt_is_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match="a prompt must be text or token ids, and not "):
        as_token_ids(wrong)
