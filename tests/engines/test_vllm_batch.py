"""softmeet's logits processor for vLLM, driven as vLLM's model runners drive one, by a stub of what it imports."""

import random
import sys
from dataclasses import dataclass, field
from enum import Enum, auto
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from softmeet_vllm import start
from softmeet_vllm.asked import Mixed

from softmeet import Ensemble
from softmeet.errors import InvalidInputError, VocabularyMismatchError
from softmeet.members import zoo

OWN, OTHER, V = "wide/gpt2", "wide/llama", 4096


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class Update:
    batch_size: int
    removed: list
    added: list
    moved: list


@dataclass
class Params:
    """The fields of vLLM's SamplingParams that are looked at, with its defaults."""

    extra_args: dict | None = None
    logit_bias: dict | None = None
    allowed_token_ids: list | None = None
    bad_words: list | None = None
    min_tokens: int = 0
    structured_outputs: object = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_logprobs: int | None = None


@pytest.fixture
def processor(monkeypatch):
    """The module of the processor, made of a stub of vLLM."""
    names = ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].SamplingParams = Params
    own = sys.modules[names[-1]]
    own.LogitsProcessor, own.BatchUpdate, own.MoveDirectionality = type("V1", (), {}), Update, Direction
    sys.modules.pop("softmeet_vllm.processor", None)
    monkeypatch.setenv("SOFTMEET_MEMBERS", OTHER)
    yield import_module("softmeet_vllm.processor")
    sys.modules.pop("softmeet_vllm.processor")


def config(**model):
    folder = str(zoo.locate(OWN))
    own = {"model": folder, "tokenizer": folder, "max_model_len": 64, "logprobs_mode": "processed_logprobs"}
    own |= {"enable_prompt_embeds": False, "is_multimodal_model": False}
    return SimpleNamespace(
        model_config=SimpleNamespace(**own | model, get_vocab_size=lambda: V),
        scheduler_config=SimpleNamespace(max_num_seqs=8, async_scheduling=False), speculative_config=None,
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, distributed_executor_backend="mp",
            data_parallel_backend="mp",
        ), use_v2_model_runner=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ensemble():
    return Ensemble.from_pretrained([OWN, OTHER], "logit-mean", weights=[1, 1])


@pytest.fixture(scope="module")
def alone():
    return Ensemble.from_pretrained([OWN], "logit-mean")


def behind(ensemble, ids, **settings):
    """What an ensemble says follows token ids, by softmeet's own road."""
    with torch.inference_mode():
        return ensemble.model(torch.tensor([ids]), logits_to_keep=1, **settings).logits[0, -1]


@dataclass
class Request:
    prompt: list
    params: Params
    settings: dict
    answer: list = field(default_factory=list)


def new_request(draw):
    ids = [draw.randrange(5, V) for _ in range(draw.randrange(1, 12))]
    weight, rule = draw.choice([0.0, 0.3, 0.5, 1.0]), draw.choice(["logit-mean", "prob-mean", "power-mean:order=0.5"])
    asked = {"softmeet_rule": rule, "softmeet_weights": [weight, 1 - weight], "softmeet_temperature": 0.8}
    settings = {"rule": rule, "weights": [weight, 1 - weight], "rule_temperature": 0.8}
    plain = draw.random() < 0.2
    return Request(ids, Params(None if plain else asked | {"other": 1}), {"rule": "logit-mean"} if plain else settings)


def steps_of(draw, batch, width):
    """Change a batch as vLLM's does: requests end or are preempted, others come, some move; return the update."""
    removed, added, moved, gone = [], [], [], []
    for place in sorted(batch):
        if draw.random() < 0.15:
            removed.append(place)
            gone.append(batch.pop(place))
    waiting = [one for one in gone if draw.random() < 0.5] + [new_request(draw) for _ in range(draw.randrange(3))]
    for one in waiting:
        free = [place for place in range(width) if place not in batch]
        if free:
            place = draw.choice(free)
            batch[place] = one
            added.append((place, one.params, one.prompt, one.answer))
    if len(batch) > 1 and draw.random() < 0.4:
        one, other = draw.sample(sorted(batch), 2)
        batch[one], batch[other] = batch[other], batch[one]
        moved.append((one, other, Direction.SWAP))
    holes = [place for place in range(width) if place not in batch]
    if batch and holes and holes[0] < max(batch):
        last = max(batch)
        batch[holes[0]] = batch.pop(last)
        moved.append((last, holes[0], Direction.UNIDIRECTIONAL))
    return Update(len(batch), removed[::-1], added, moved) if removed or added or moved else None


@pytest.mark.parametrize("seed", range(2))
def test_rows_follow_the_batch(processor, ensemble, alone, seed):
    mixture, draw, batch = processor.Mixture(config(), "cpu", False), random.Random(seed), {}
    compared = 0
    for _ in range(18):
        mixture.update_state(steps_of(draw, batch, 8))
        logits = torch.randn(8, V)
        for place, one in batch.items():
            logits[place] = behind(alone, one.prompt + one.answer) + draw.random()
        before = logits.clone()
        logits = mixture.apply(logits)
        for place in range(8):
            if place not in batch:
                assert torch.equal(logits[place], before[place])
                continue
            one = batch[place]
            expected = behind(ensemble, one.prompt + one.answer, settings=ensemble_settings(ensemble, one))
            error = 0.5 * (logits[place].softmax(-1) - expected.softmax(-1)).abs().sum()
            assert error < 1e-4, (place, one)
            compared += 1
            if draw.random() < 0.9:  # else the prompt is not read to its end, and what is drawn is dropped
                one.answer.append(int(logits[place].argmax()))
    assert compared > 40
    mixture.update_state(Update(0, [*batch], [], []))
    assert [len(reader._rows) for reader in mixture._others.readers] == [0]


def ensemble_settings(ensemble, one):
    return ensemble.model.settings.changed(**one.settings)


def test_bias_and_forbidden_tokens_are_of_the_mixture(processor, ensemble, alone):
    mixture, ids = processor.Mixture(config(), "cpu", False), [10, 20, 30]
    mixture.update_state(Update(1, [], [(0, Params(logit_bias={7: 5.0, 9: -100.0}), ids, [])], []))
    logits, expected = behind(alone, ids).clone(), behind(ensemble, ids).clone()
    for one in logits, expected:
        one[7] += 5
        one[9] -= 100
        one[100:] = -torch.inf
    found = mixture.apply(logits[None])[0].log_softmax(-1)
    torch.testing.assert_close(found, expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_the_second_runner_has_rows_by_slots(processor, ensemble, alone):
    tokens = torch.zeros(4, 64, dtype=torch.int32)
    requests = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens))
    mixture = processor.Mixture(config(), requests)
    texts = {2: [5, 6, 7], 0: [9, 10]}
    for slot, ids in texts.items():
        tokens[slot, : len(ids)] = torch.tensor(ids)
        assert mixture.add_request(slot, Params())
    for _ in range(3):
        slots = [0, 2]
        logits = torch.stack([behind(alone, texts[slot]) for slot in slots])
        places = torch.tensor([len(texts[slot]) - 1 for slot in slots])
        context = SimpleNamespace(expanded_idx_mapping=torch.tensor(slots), pos=places)
        found = mixture.apply(logits, context)
        for row, slot in zip(found, slots, strict=True):
            torch.testing.assert_close(row.log_softmax(-1), behind(ensemble, texts[slot]), atol=1e-3, rtol=0)
            tokens[slot, len(texts[slot])] = int(row.argmax())
            texts[slot].append(int(row.argmax()))
    assert mixture.add_request(2, Params())
    assert [len(reader._rows) for reader in mixture._others.readers] == [1]
    only = SimpleNamespace(expanded_idx_mapping=torch.tensor([2]), pos=torch.tensor([1]))
    for _ in range(66):
        mixture.apply(torch.zeros(1, V), only)
    (reader,) = mixture._others.readers
    assert len(reader._rows) == 1, "the text of slot 0 is gone, and its row is kept"
    again = SimpleNamespace(expanded_idx_mapping=torch.tensor([0]), pos=torch.tensor([len(texts[0]) - 1]))
    found = mixture.apply(behind(alone, texts[0])[None].clone(), again)
    torch.testing.assert_close(found[0].log_softmax(-1), behind(ensemble, texts[0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"softmeet_weigths": [1, 0]}, "expected softmeet_rule, softmeet_weights, softmeet_temperature"),
        ({"softmeet_weights": [1, 0, 2]}, "expected one weight per member, 2 in all, got 3"),
        ({"softmeet_weights": "auto"}, "vLLM does not tell sizes"),
        ({"softmeet_rule": "meet"}, "the rule meet reads output layers, which vLLM does not hand out"),
        ({"softmeet_rule": "logit-mean:gate=safe:0.5"}, "expected no gate in vLLM"),
        ({"softmeet_temperature": -1}, "rule_temperature"),
    ],
)
def test_a_request_that_cannot_be_mixed_is_refused(processor, asked, said):
    with pytest.raises(ValueError, match=said):
        processor.Mixture.validate_params(Params(asked))


def test_options_of_vllm_that_would_mean_one_model_are_refused(processor, monkeypatch):
    check = processor.Mixture.validate_params
    check(Params(min_tokens=3, repetition_penalty=1.2, logit_bias={1: 2.0}))
    with pytest.raises(ValueError, match="min_tokens forbids tokens before models are mixed, which the rule prob-mean"):
        check(Params({"softmeet_rule": "prob-mean"}, min_tokens=3))
    with pytest.raises(ValueError, match="prompt_logprobs, of which echo with logprobs is made, are those of vLLM's"):
        check(Params(prompt_logprobs=1))
    check(Params({"softmeet_weights": [1, 0]}, prompt_logprobs=1))
    monkeypatch.setattr(start, "second_runner", True)
    with pytest.raises(ValueError, match="repetition_penalty changes the logits of one model before the mixture"):
        check(Params(repetition_penalty=1.2))


def test_without_members_nothing_is_mixed(processor, monkeypatch):
    monkeypatch.delenv("SOFTMEET_MEMBERS")
    mixture, logits = processor.Mixture(config(), "cpu", False), torch.randn(2, V)
    mixture.update_state(Update(1, [], [(0, Params(), [1], [])], []))
    assert mixture.is_argmax_invariant()
    assert torch.equal(mixture.apply(logits.clone()), logits)
    with pytest.raises(ValueError, match="this server mixes nothing"):
        processor.Mixture.validate_params(Params({"softmeet_weights": [1, 0]}))


def test_a_text_of_vllms_model_alone_is_read_by_no_other(processor, alone):
    mixture, ids = processor.Mixture(config(), "cpu", False), [10, 20, 30]
    own = Params({"softmeet_weights": [1, 0], "softmeet_temperature": 0.5})
    mixture.update_state(Update(2, [], [(0, own, ids, []), (1, Params(), ids, [])], []))
    found = mixture.apply(torch.stack([behind(alone, ids)] * 2))
    torch.testing.assert_close(found[0].log_softmax(-1), (2 * behind(alone, ids)).log_softmax(-1))
    assert [len(reader._rows) for reader in mixture._others.readers] == [1]


def test_what_was_read_of_a_prompt_is_not_read_again(processor, alone, monkeypatch):
    mixture, ids = processor.Mixture(config(), "cpu", False), list(range(10, 40))
    (reader,) = mixture._others.readers
    read, counts = reader.read, []

    def counted(asked):
        counts.append(sum(len(one.symbols) for one in asked))
        return read(asked)

    monkeypatch.setattr(reader, "read", counted)
    for k, prompt in enumerate((ids, [*ids, 50, 51])):
        mixture.update_state(Update(1, [0] * k, [(0, Params(), prompt, [])], []))
        mixture.apply(behind(alone, prompt)[None].clone())
    assert counts[0] == 30
    assert counts[1] <= 3, "an ended text's prompt was kept for nothing"


def test_a_text_that_cannot_be_read_ends_alone(processor, ensemble, alone, monkeypatch, caplog):
    mixture, ids = processor.Mixture(config(), "cpu", False), [10, 20, 30]
    end = mixture._others._end
    mixture.update_state(Update(3, [], [(k, Params(), own, []) for k, own in enumerate(([5, V], ids, ids))], []))
    logits = torch.stack([behind(alone, ids)] * 3)
    logits[2, :] = -torch.inf
    logits[2, 4090:] = 0.0
    monkeypatch.setattr(mixture._others._combiner, "support", torch.arange(V) < 4090)
    for _ in range(2):
        found = mixture.apply(logits.clone())
        for row in (found[0], found[2]):
            assert row.argmax() == end
            assert row.isneginf().sum() == V - 1
        torch.testing.assert_close(found[1].log_softmax(-1)[:4090].exp().sum(), torch.tensor(1.0))
    said = [record.getMessage() for record in caplog.records if record.name == "vllm.softmeet"]
    assert len(said) == 2
    assert f"expected symbols of {OTHER} below 4,096, got 4096" in " ".join(said)
    assert [len(reader._rows) for reader in mixture._others.readers] == [1]


def test_penalties_that_look_at_signs_are_those_of_logits(processor, alone):
    mixture, ids = processor.Mixture(config(), "cpu", False), [10, 20, 30]
    mixture.update_state(Update(1, [], [(0, Params(), ids, [])], []))
    own = behind(alone, ids)[None] + 12.5
    assert mixture.apply(own.clone()).logsumexp(-1).item() == pytest.approx(12.5, abs=1e-3)


def test_what_cannot_be_mixed_is_refused_at_the_start(processor, monkeypatch):
    with pytest.raises(InvalidInputError, match="start it with --max-model-len 256"):
        processor.Mixture(config(max_model_len=4096), "cpu", False)
    good = config()
    good.scheduler_config.async_scheduling = True
    with pytest.raises(InvalidInputError, match="without asynchronous scheduling, which its plugin softmeet"):
        processor.Mixture(good, "cpu", False)
    start.check(good)
    assert good.scheduler_config.async_scheduling is False
    for part, name, value, said in (
        (None, "speculative_config", object(), "vLLM drops the mixture where it speculates"),
        ("parallel_config", "tensor_parallel_size", 2, "expected --tensor-parallel-size 1"),
        ("parallel_config", "data_parallel_backend", "ray", "which vLLM does not send through Ray"),
        ("model_config", "enable_prompt_embeds", True, "prompts of tokens alone.* got --enable-prompt-embeds"),
        ("model_config", "is_multimodal_model", True, "prompts of tokens alone.* got a model of images"),
    ):
        wrong = config()
        setattr(getattr(wrong, part) if part else wrong, name, value)
        with pytest.raises(InvalidInputError, match=said):
            start.check(wrong)
    monkeypatch.setenv("SOFTMEET_MEMBERS", "mixed/llama")
    with pytest.raises(VocabularyMismatchError, match="expected members with one vocabulary"):
        start.check(config())
    monkeypatch.setenv("SOFTMEET_MEMBERS", OTHER)
    monkeypatch.setenv("SOFTMEET_RULE", "meet")
    with pytest.raises(InvalidInputError, match="reads output layers"):
        start.check(config())


def test_configurations_are_checked_when_they_are_made(processor, monkeypatch):
    class VllmConfig:
        def __init__(self):
            self.__post_init__()

        def __post_init__(self):
            vars(self).update(vars(config()), speculative_config=object())

    module = ModuleType("vllm.config")
    module.VllmConfig = VllmConfig
    monkeypatch.setitem(sys.modules, "vllm.config", module)
    start.register()
    checked = VllmConfig.__post_init__
    start.register()
    assert VllmConfig.__post_init__ is checked
    with pytest.raises(InvalidInputError, match="vLLM drops the mixture"):
        VllmConfig()
    monkeypatch.delenv("SOFTMEET_MEMBERS")
    assert VllmConfig().speculative_config is not None
    assert Mixed.of() == Mixed()
