"""How the embedded models are trained: the experts' gradients, the balance, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bard import expert_rows
from bard.configs import MODELS
from bard.report import distinct_experts, mark, score
from bard.training import Recipe, Training, load_balance, rate

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "initializer_range": 0.3,
    "output_router_logits": True,
}
CLASSES = {"bard": (MixtralForCausalLM, MixtralConfig), "bard-fine": (Qwen3MoeForCausalLM, Qwen3MoeConfig)}


def small(name: str) -> PreTrainedModel:
    torch.manual_seed(3)
    model_class, config_class = CLASSES[name]
    return model_class(config_class(**SMALL))


@pytest.mark.parametrize("name", MODELS)
def test_experts_by_rows_are_transformers_experts(name: str) -> None:
    """Logits and every gradient, the routers' too; transformers' own is the truth."""
    model, found = small(name), []
    for implementation in ("eager", expert_rows.NAME):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(torch.arange(34).view(2, 17)).logits
        logits.square().mean().backward()
        found.append({"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()})
    for what, ours in found[1].items():
        torch.testing.assert_close(
            ours, found[0][what], rtol=1e-4, atol=1e-6, msg=lambda text, what=what: f"{what}: {text}"
        )


def test_an_expert_that_nothing_chose_gets_no_gradient() -> None:
    x_TH, w13_ENH, w2_EHI = torch.randn(1, 4, requires_grad=True), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    w13_ENH.requires_grad_()
    out_TH = expert_rows.ExpertRows.apply(x_TH, w13_ENH, w2_EHI, torch.tensor([[2]]), torch.ones(1, 1))
    out_TH.sum().backward()
    assert [bool(g.any()) for g in w13_ENH.grad] == [False, False, True]


def test_the_embedded_models_are_what_their_cards_say() -> None:
    fine, coarse = (MODELS[name].make(2048) for name in ("bard-fine", "bard"))
    assert (fine.config.model_type, coarse.config.model_type) == ("qwen3_moe", "mixtral")
    assert [(m.config.num_experts, m.config.num_experts_per_tok) for m in (fine, coarse)] == [(64, 8), (8, 2)]
    assert all(2 * model.num_parameters() < 24e6 for model in (fine, coarse))


def test_the_balance_is_one_when_even_and_grows_when_not() -> None:
    even = torch.eye(4).repeat(3, 1) * 5
    assert load_balance((even,), 1).item() == pytest.approx(1.0)
    collapsed = torch.zeros(12, 4)
    collapsed[:, 1] = 5
    assert load_balance((collapsed,), 1).item() > 3
    assert load_balance((even, collapsed), 1).item() == pytest.approx((1 + load_balance((collapsed,), 1).item()) / 2)


def test_the_rate_warms_up_holds_and_decays() -> None:
    assert rate(0, 1000) == pytest.approx(0.02) and rate(49, 1000) == rate(400, 1000) == 1.0
    assert rate(700, 1000) == pytest.approx(0.5) and 0 < rate(999, 1000) < 0.002


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    stream, says = torch.randint(40, (2000,)), []
    recipe = Recipe(epochs=4 * 256 / 2000 + 1e-4, balance=0.1, batch=1, weight_decay=0.1, check_every=2)
    whole = Training(small("bard-fine"), stream, recipe, tmp_path / "whole")
    whole.run(lambda: says.append("checked") or "")
    assert (whole.done, len(says)) == (4, 2)
    half = Training(small("bard-fine"), stream, recipe, tmp_path / "half")
    for step in range(2):
        half._step(rate(step, 4))
    half._save()
    rest = Training(small("bard-fine"), stream, recipe, tmp_path / "half")
    assert rest.done == 2
    rest.run(lambda: "")
    for (name, ours), theirs in zip(rest.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert rest.smooth == whole.smooth


def test_every_token_is_scored_once() -> None:
    model = small("bard")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    nats, routed_LTK = score(model, list(range(30)) * 10)
    assert nats == pytest.approx(299 * torch.tensor(40.0).log().item(), rel=1e-5)
    assert routed_LTK.shape == (2, 299, 3)


def test_distinct_experts_of_a_window() -> None:
    routed_LTK = torch.tensor([[[0, 1], [0, 1], [2, 3], [0, 1], [4, 5]]])
    assert distinct_experts(mark(routed_LTK, 6), 2) == 3.0  # two of the first window, four of the second
    assert distinct_experts(mark(routed_LTK, 6), 1) == 2.0
