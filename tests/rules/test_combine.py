"""What ``combine`` accepts and refuses; every refusal says what was expected, what came and what to do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from instances import outputs, random_heads

import softmeet
from softmeet.errors import DisjointSupportError, InvalidInputError, NonFiniteError, SoftmeetError
from softmeet.heads import SoftmaxHead
from softmeet.simplex import total_variation

pytestmark = pytest.mark.checked

HEADS = random_heads(20, (3, 4), seed=0)
LOG_P = outputs(HEADS, 3, seed=0)


def broken(member, row, value):
    log_p = LOG_P.clone()
    log_p[member, row, 5] = value
    return log_p


CAPPED = [SoftmaxHead(HEADS[0], soft_cap=9.0), HEADS[1]]
BROKEN = [SoftmaxHead(HEADS[0] * math.inf, soft_cap=9.0), HEADS[1]]
MASK = torch.arange(20) < 18
ARRAYS = "as a tensor, a NumPy array, or lists"
FLOATS = "numbers that a float can hold"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": LOG_P * 7}, "pass log_softmax"),
        ({"log_probs": LOG_P.long()}, r"floating tensor \(n members"),
        ({"log_probs": LOG_P[0, 0]}, r"got torch.float64 of shape \(20,\)"),
        ({"log_probs": LOG_P.to_sparse()}, "log_probs as a dense tensor, got a nested or sparse"),
        ({"log_probs": LOG_P.to("meta")}, "log_probs as a dense tensor, got one on the device meta"),
        ({"log_probs": LOG_P.to(torch.float8_e4m3fn)}, "got torch.float8_e4m3fn"),
        ({"log_probs": [["a", "b"]]}, f"log_probs {ARRAYS} of numbers"),
        ({"log_probs": [[0.0], [0.0, 1.0]]}, f"expected log_probs {ARRAYS} of numbers of one length, got list"),
        ({"log_probs": np.array([["a"]])}, "got ndarray: its dtype is <U1"),
        ({"log_probs": None}, "got NoneType"),
        ({"log_probs": LOG_P.to(torch.complex64).numpy()}, "its dtype is complex64"),
        ({"log_probs": [True, False]}, "a floating tensor"),
        ({"heads": HEADS[:1]}, "one head per member, 2 in all, got 1"),
        ({"heads": SoftmaxHead(HEADS[0])}, "expected a list of heads, one per member, 2 in all, got SoftmaxHead"),
        ({"heads": HEADS[0].numpy()}, r"a floating tensor of shape \(v, d\)"),
        ({"heads": [HEADS[0], HEADS[1][:10]]}, r"20 rows for member 1.*shape \(10, 4\)"),
        ({"heads": [HEADS[0], torch.zeros(21, 4)]}, r"shape \(21, 4\)"),
        ({"heads": [None, HEADS[1]]}, f"head of member 0 {ARRAYS}"),
        ({"heads": [HEADS[0], "W"]}, f"head of member 1 {ARRAYS}"),
        ({"heads": [HEADS[0], [[1.0, None]] * 20]}, f"expected the head of member 1 {ARRAYS}"),
        ({"heads": [HEADS[0], HEADS[1].to_sparse()]}, "head of member 1 as a dense tensor"),
        ({"heads": [SoftmaxHead(HEADS[0].to("meta")), HEADS[1]]}, "load the weights first"),
        ({"heads": [torch.zeros(20, 0), HEADS[1]]}, "at least one row and one column"),
        ({"heads": [HEADS[0] * 1e200, HEADS[1]]}, "overflows"),
        ({"heads": BROKEN, "logits": LOG_P}, "finite"),
        ({"heads": CAPPED}, "pass the members' capped"),
        ({"heads": CAPPED, "logits": "none"}, "expected logits as a tensor"),
        ({"heads": CAPPED, "logits": LOG_P.to_sparse()}, "logits as a dense tensor"),
        ({"heads": CAPPED, "logits": LOG_P.transpose(0, 1)}, r"logits of shape \(2, 3, 20\)"),
        ({"rule": "mean"}, r"unknown rule 'mean': did you mean prob-mean\? expected one of meet, max-entropy"),
        ({"rule": "power-mean:order=2"}, "order of power-mean to be less than or equal to 1, got '2'"),
        ({"rule": "power-mean", "order": -0.1}, "order of power-mean to be greater than or equal to 0, got -0.1"),
        ({"rule": "power-mean", "order": math.nan}, "order of power-mean to be .*got nan"),
        ({"pool": "power-mean"}, "pool to be 'logit-mean' or 'prob-mean', got 'power-mean'"),
        ({"weights": [0.5]}, "one weight per member, 2 in all, got 1"),
        ({"weights": 0.5}, "one weight per member, 2 in all, got 1"),
        ({"weights": "much"}, "weights to be a number or a list"),
        ({"weights": [0.0, 0.0]}, "a positive weight"),
        ({"weights": [0.5, math.nan]}, "finite weights"),
        ({"weights": [1e308, 1e308], "free_weights": True}, "finite sum"),
        ({"weights": [10**400, 1]}, f"weights to be {FLOATS}"),
        ({"trust": -1.0}, "trusts from 0 to inf"),
        ({"trust": math.nan}, "trusts from 0 to inf"),
        ({"trust": [1.0, 2.0, 3.0]}, "2 in all, got 3"),
        ({"trust": "much"}, "trust to be a number or a list"),
        ({"trust": torch.ones(2, 2)}, r"array of shape \(2, 2\)"),
        ({"trust": 10**400}, f"trust to be {FLOATS}"),
        ({"trust": [10**5000, 1]}, f"trust to be {FLOATS}"),
        ({"tol": 0.0}, "tol to be greater than 0, got 0"),
        ({"tol": "much"}, "tol to be a valid number"),
        ({"tol": 10**5000}, "tol to be .* got a large int"),
        ({"max_steps": 0}, "max_steps to be an integer of at least 1"),
        ({"on_infeasible": "guess"}, "on_infeasible to be 'meet' or 'raise'"),
        ({"start": "meet"}, "what combine returned as start=, got str"),
        ({"support": torch.ones(19, dtype=torch.bool)}, r"bool mask of shape \(20,\)"),
        ({"support": torch.ones(20, dtype=torch.bool).to_sparse()}, "support as a dense tensor"),
        ({"support": [1.0] * 20}, "expected a bool mask"),
    ],
)
def test_refused_with_a_reason(change, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        softmeet.combine(**{"log_probs": LOG_P, "heads": HEADS, **change})
    assert isinstance(caught.value, SoftmeetError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": broken(1, 2, math.nan)}, r"got NaN from member 1 in 1 of 3 rows, first row 2"),
        ({"log_probs": broken(0, 1, math.inf)}, r"got \+inf from member 0"),
        ({"log_probs": torch.full_like(LOG_P, -math.inf)}, "only -inf from member 0"),
        ({"heads": CAPPED, "logits": LOG_P + 50}, "soft-cap 9"),
        ({"heads": CAPPED, "logits": LOG_P * math.nan}, "none NaN"),
        ({"heads": CAPPED, "logits": LOG_P - 50}, "beyond its soft-cap 9"),
    ],
)
def test_numbers_that_are_none_are_named(change, message):
    with pytest.raises(NonFiniteError, match=message):
        softmeet.combine(**{"log_probs": LOG_P, "heads": HEADS, **change})


@pytest.mark.parametrize("rule", ["meet", "max-entropy", "logit-mean", "one-hot"])
def test_disjoint_supports_name_the_rows(rule):
    log_p = torch.full((2, 2, 20), -math.inf, dtype=torch.float64)
    log_p[0, :, :10] = log_p[1, :, 10:] = -math.log(10)
    log_p[:, 0] = -math.log(20)
    with pytest.raises(DisjointSupportError, match=r"found none in rows \[1\].*prob-mean"):
        softmeet.combine(log_p, HEADS, rule)
    assert softmeet.combine(log_p, HEADS, "prob-mean").log_probs[1].exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("pool", ["logit-mean", "prob-mean"])
@pytest.mark.parametrize("rule", ["meet", "max-entropy"])
def test_zeros_of_one_member_are_zeros_of_the_answer(rule, pool):
    log_p = LOG_P.clone()
    log_p[0, 1, :4] = -math.inf
    log_p = log_p.log_softmax(-1)
    solution = softmeet.combine(log_p, HEADS, rule, trust=2.0, pool=pool, tol=1e-9)
    assert solution.log_probs[1, :4].isneginf().all()
    assert solution.log_probs[1, 4:].isfinite().all()
    assert solution.log_probs[0].isfinite().all()
    assert (solution.verify(HEADS, log_p).gap < 1e-8).all()


def test_one_hot_is_the_essays_unconstrained_optimum():
    ours = softmeet.combine(LOG_P, HEADS, "one-hot")
    best = LOG_P.sum(0).argmax(-1)
    assert torch.equal(ours.log_probs.exp().argmax(-1), best)
    assert torch.equal(ours.log_probs.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(ours.objective, -LOG_P.mean(0).gather(-1, best[:, None]).squeeze(-1))


def test_padding_that_was_trained_stays_in_the_moments():
    support = torch.arange(20) < 16
    solution = softmeet.combine(LOG_P, HEADS, trust=2.0, support=support, tol=1e-10)
    assert solution.log_probs[:, 16:].isneginf().all()
    pool = softmeet.combine(LOG_P, HEADS, "logit-mean", support=support).log_probs
    assert pool[:, 16:].isneginf().all()
    assert (solution.verify(HEADS, LOG_P).gap < 1e-9).all()
    cut = softmeet.combine(LOG_P[..., :16].log_softmax(-1), [W[:16] for W in HEADS], trust=2.0, tol=1e-10)
    assert total_variation(cut.log_probs, solution.log_probs[:, :16]).max() > 1e-3  # not the same thing


def test_padding_that_was_added_can_be_cut_or_left_short():
    """A member without the last rows excludes them; its short head gives the same as a head that has them."""
    log_p = torch.stack([LOG_P[0, :, :16].log_softmax(-1), LOG_P[1, :, :16].log_softmax(-1)])
    padded = torch.nn.functional.pad(log_p, (0, 4), value=-math.inf)
    short = softmeet.combine(padded, [HEADS[0][:16], HEADS[1]], trust=2.0, tol=1e-10)
    cut = softmeet.combine(log_p, [W[:16] for W in HEADS], trust=2.0, tol=1e-10)
    assert total_variation(short.log_probs[:, :16], cut.log_probs).max() < 1e-5


def test_a_soft_cap_changes_the_moments():
    heads = [SoftmaxHead(HEADS[0], soft_cap=2.0), SoftmaxHead(HEADS[1], soft_cap=2.0)]
    logits = torch.stack([h.logits(torch.ones(3, h.d, dtype=torch.float64)) for h in heads])
    log_p = logits.log_softmax(-1)
    capped = softmeet.combine(log_p, heads, trust=2.0, logits=logits, tol=1e-10)
    assert (capped.verify(heads, log_p, logits=logits).gap < 1e-9).all()
    dense = [head.slope(own)[0][:, None] * head.weight for head, own in zip(heads, logits, strict=True)]
    ours = capped.log_probs[0]
    for k, (W, t) in enumerate(zip(dense, (2.0, 2.0), strict=True)):
        r = (log_p[k, 0] - W @ capped._answer.dual[k][0] / t).log_softmax(-1)
        assert (W.T @ (ours.exp() - r.exp())).abs().max() < 1e-5


def test_logits_of_ten_thousand():
    log_p = (LOG_P * 1000).log_softmax(-1)
    solution = softmeet.combine(log_p, HEADS, trust=0.5, tol=1e-6, max_steps=40)
    assert solution.log_probs.logsumexp(-1).abs().max() < 1e-9
    assert not solution.log_probs.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    solution = softmeet.combine(LOG_P.to(dtype), HEADS)
    assert solution.log_probs.dtype == torch.promote_types(dtype, torch.float32)


def test_the_public_names_are_pinned():
    assert softmeet.__all__ == [
        "RULES", "Decoder", "Decoding", "Ensemble", "Files", "Member", "Passage", "Reader", "Rule", "Settings",
        "SoftmaxHead", "Solution", "Status", "StoppedBy", "Structure", "__version__", "combine", "decoder_names",
        "register_decoder", "register_reader", "register_rule", "rule_names", "time_is_over", "time_limit",
    ]  # fmt: skip
    assert all(hasattr(softmeet, name) for name in softmeet.__all__)
    assert [rule.name for rule in softmeet.RULES] == [
        "meet", "max-entropy", "least-squares", "min-cross-entropy", "min-squared-cross-entropy", "min-underestimation",
        "min-reverse-cross-entropy", "logit-mean", "prob-mean", "power-mean", "one-hot", "pointwise-max",
        "pointwise-min", "drop", "core",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        softmeet.nothing  # noqa: B018


def test_every_status_is_a_sentence():
    assert all(" " in str(status) for status in softmeet.Status)


@pytest.mark.parametrize("rule", [rule.name for rule in softmeet.RULES])
def test_an_empty_batch_is_answered_and_verified_and_inputs_are_not_mutated(rule):
    log_p, heads = LOG_P.clone(), [W.clone() for W in HEADS]
    solution = softmeet.combine(log_p[:, :0], heads, rule)
    assert solution.log_probs.shape == (0, 20)
    assert solution.residual.shape == (2, 0)
    assert solution.verify(heads, log_p[:, :0]).status.shape == (0,)
    softmeet.combine(log_p, heads, rule, trust=[0.3, 4.0], weights=[0.5, 0.5])
    assert torch.equal(log_p, LOG_P)
    assert all(torch.equal(a, b) for a, b in zip(heads, HEADS, strict=True))


def read_only(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "form",
    [
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        list,
        read_only,
        lambda t: list(t.numpy()),
        lambda t: t.numpy()[..., ::-1].copy()[..., ::-1],
        lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder()),
    ],
    ids=["array", "lists", "list of tensors", "read-only", "list of arrays", "strides", "byte order"],
)
def test_arrays_and_lists_are_as_good_as_tensors(form):
    heads, log_p = list(map(form, HEADS)), form(LOG_P)
    ours = softmeet.combine(log_p, heads, support=form(MASK))
    theirs = softmeet.combine(LOG_P, HEADS, support=MASK)
    assert torch.equal(ours.log_probs, theirs.log_probs)
    assert ours.log_probs.dtype == torch.float64
    verified = ours.verify(heads, log_p)
    assert torch.equal(verified.gap, theirs.verify(HEADS, LOG_P).gap)
    capped = softmeet.combine(LOG_P, CAPPED, logits=log_p)
    assert torch.equal(capped.log_probs, softmeet.combine(LOG_P, CAPPED, logits=LOG_P).log_probs)


def test_the_dtype_of_arrays_counts_as_that_of_tensors():
    ours = softmeet.combine(LOG_P.float().numpy(), [HEADS[0].half(), HEADS[1].tolist()])
    assert torch.equal(ours.log_probs, softmeet.combine(LOG_P.float(), [HEADS[0].half(), HEADS[1]]).log_probs)
    assert ours.log_probs.dtype == torch.float32
    mixed = softmeet.combine([LOG_P[0].float(), LOG_P[1].numpy()], HEADS)
    assert mixed.log_probs.dtype == torch.float64
    whole = [[[1, 0]] * 19 + [[0, 1]], np.eye(20, 2, dtype=np.int8)]
    assert torch.equal(
        softmeet.combine(LOG_P, whole).log_probs,
        softmeet.combine(LOG_P, [torch.tensor(w).double() for w in whole]).log_probs,
    )
