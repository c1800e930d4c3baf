"""The Ray engine: the same bytes as the local one for any number of workers, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from transformers import OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.errors import InvalidInputError, NonFiniteError, WorkerLostError
from softmeet.evaluation.choices import parse_choices, with_baselines
from softmeet.evaluation.documents import Document
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.perplexity import evaluate_positions, evaluate_text
from softmeet.evaluation.report import summary
from softmeet.evaluation.save import figures
from softmeet.evaluation.trace import record
from softmeet.scaling.local import LocalEngine
from softmeet.scaling.packing import pack, parts, unpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.cluster_utils import Cluster

    from softmeet.scaling import ray_engine
    from softmeet.scaling.cluster import connect
    from softmeet.scaling.ray_engine import RayEngine

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of Ray and what it imports
WORDS = "the quick brown fox jumps over the lazy dog. "
DOCUMENTS = [Document(f"d{k}", WORDS[k:] * 2) for k in range(12)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two members, of which one has 8 MiB of positions: they cost no time, and cannot be overlooked in memory."""
    folder = tmp_path_factory.mktemp("members")
    long = OPTConfig(
        vocab_size=tiny.V, hidden_size=32, word_embed_proj_dim=8, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1 << 16, init_std=0.2, **tiny.IDS,
    )  # fmt: skip
    torch.manual_seed(1)
    OPTForCausalLM(long).save_pretrained(folder / "long")
    tiny.tokenizer().save_pretrained(folder / "long")
    return [tiny.save(folder / "gpt2", "gpt2"), folder / "long"]


@pytest.fixture(scope="module")
def ensemble(folders):
    return Ensemble.from_pretrained(folders)


@pytest.fixture(scope="module")
def engine(ensemble):
    """Three workers that have the ensemble, on two nodes, each with an object store of its own."""
    more = {"object_store_memory": 1 << 28}
    cluster = Cluster(
        initialize_head=True, connect=True, head_node_args={"num_cpus": 4, "include_dashboard": False, **more}
    )
    cluster.add_node(num_cpus=4, **more)
    cluster.wait_for_nodes()
    with RayEngine(ensemble, 3) as engine:
        yield engine
    ray.shutdown()
    cluster.shutdown()


def evaluated(ensemble, engine, **options):
    """The reduced JSON; both gates are closed at some positions."""
    gated = [f"meet:trust=0.5:gate={gate}" for gate in ("disagreement:0.1", "unsure:0.2")]
    choices = parse_choices(["logit-mean", "meet:trust=0.5", *gated], 2)
    return json.dumps(summary(evaluate_text(ensemble, DOCUMENTS, choices, engine=engine, **options)))


@pytest.fixture(scope="module")
def expected(ensemble):
    with LocalEngine(3) as engine:
        return evaluated(ensemble, engine)


def test_an_evaluation_is_the_same_to_the_last_byte(engine, ensemble, folders, expected):
    assert evaluated(ensemble, engine) == expected
    other = Ensemble.from_pretrained(folders[::-1], "meet")
    with LocalEngine() as local:  # one that the workers do not have
        assert evaluated(other, engine) == evaluated(other, local)


def _act(what):
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise NonFiniteError("NaN from a member")
    return what


def test_no_more_is_under_way_than_there_are_workers(engine):
    """Items are taken from their iterable as there is room for them, however slow the caller is."""
    taken = []

    def items():
        for k in range(20):
            taken.append(k)
            yield (str(k),)

    for count, _ in enumerate(engine.map(_act, items()), 1):
        # Done, under way, and one for each worker to choose from.
        assert len(taken) <= count + 2 * engine.workers
    assert len(taken) == 20


def _look(model, seconds):
    """(process, node, where in which file of shared memory the head lies, what reading all weights added)."""
    head, own = model.heads[0].weight, psutil.Process()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode, *path = line.split()
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= head.data_ptr() < high:
            break
    before = own.memory_full_info().uss
    sum(weight.sum().item() for weight in model.parameters())
    added = own.memory_full_info().uss - before
    time.sleep(seconds)
    place = path[0].startswith("/dev/shm"), device, inode, int(offset, 16) + head.data_ptr() - low
    return os.getpid(), ray.get_runtime_context().get_node_id(), place, added


def test_weights_lie_once_on_each_node(engine, ensemble):
    size = sum(weight.nbytes for weight in ensemble.model.parameters())
    found = [answer for _, answer in engine.map(_look, [(ensemble.model, 0.5)] * 6)]
    assert len({process for process, *_ in found}) == 3
    places = {(node, place) for _, node, place, _ in found}
    assert len({node for node, _ in places}) == len(places)  # the same bytes of the same file for workers of a node
    assert all(place[0] for _, place in places)
    assert all(added < size / 10 for *_, added in found)


def test_members_are_spread_over_devices(ensemble):
    moved = unpack(pack(ensemble)[0])
    ray_engine.spread(moved, [torch.device("meta")] * 2)
    assert all(weight.is_meta for member in moved.model.members for weight in member.parameters())
    with pytest.raises(InvalidInputError, match="part of one device or a whole number"):
        RayEngine(None, gpus=1.5)


def test_packing_gives_the_same_tensors_back(ensemble):
    shared, odd = parts(ensemble), torch.arange(40.0)[3:]
    value = {"odd": odd, "model": ensemble.model, "half": torch.ones(3, dtype=torch.bfloat16)}
    value |= {"empty": torch.zeros(0, 4), "slice": torch.arange(12.0).view(3, 4)[1:, ::2]}
    packed, _ = pack(value, shared)
    assert sum(array.nbytes for array in packed[1]) < 300  # no weight among them
    found = unpack(packed, shared)
    assert found["model"] is ensemble.model
    # Products of a tensor that lies elsewhere within a line of the cache may round differently.
    assert found["odd"].data_ptr() % 64 == odd.data_ptr() % 64 == 12
    for key in ("half", "empty", "slice", "odd"):
        assert torch.equal(found[key], value[key])
        assert found[key].dtype == value[key].dtype
    copy = unpack(*pack(ensemble)[:1])  # a member whose embeddings are tied has them once
    assert copy.model.members[0].get_input_embeddings().weight is copy.model.heads[0].weight


def test_positions_and_fits_are_the_same(engine, ensemble, tmp_path):
    options = Options(meet_positions=60, premise_positions=40, evaluations=3)
    parsed = parse_choices(["meet:trust=0.5", "logit-mean:prompt_weights=20"], 2)

    def everything(engine, folder):
        positions = record(ensemble, DOCUMENTS, folder, max_per_document=40, engine=engine).read()
        scores = summary(evaluate_positions(ensemble, positions, with_baselines(parsed), engine=engine))
        return json.dumps([scores, figures(fit(ensemble, positions, options, engine=engine))])

    with LocalEngine() as local:
        ours = everything(local, tmp_path / "local")
    assert everything(engine, tmp_path / "ray") == ours
    local, there = (sorted((tmp_path / name).iterdir()) for name in ("local", "ray"))
    assert [(p.name, p.read_bytes()) for p in local] == [(p.name, p.read_bytes()) for p in there]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "dask"], "unknown engine 'dask': expected one of local, ray"),
        (["--gpus", "1"], "are options of --engine ray"),
    ],
)
def test_engines_that_are_none(options, message):
    with pytest.raises(InvalidInputError, match=message):
        CliRunner().invoke(commands, ["evaluate", "-m", "wide", "--text", "a.txt", *options], catch_exceptions=False)


def test_no_cluster_at_an_address(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InvalidInputError, match=r"expected a Ray cluster at 127\.0\.0\.1:1, found none"):
        connect("127.0.0.1:1")


# Last, since the workers that start again are not waited for then.


def test_a_worker_that_is_killed_changes_nothing(engine, ensemble, expected):
    """It is stopped before it gets its piece, so that it surely has one when it is killed."""
    victim = next(answer for _, answer in engine.map(_pid, [()]))
    os.kill(victim, signal.SIGSTOP)
    pieces = []

    def advance(count):
        pieces.extend([count] * bool(count))  # at first, none was stored
        if len(pieces) == 1:
            os.kill(victim, signal.SIGKILL)

    assert evaluated(ensemble, engine, begin=lambda total: advance) == expected
    assert len(pieces) == len(DOCUMENTS)


def _pid():
    return os.getpid()


def test_what_kills_every_worker_is_named_and_errors_are_the_calls_own(engine):
    with pytest.raises(NonFiniteError, match="NaN from a member"):
        list(engine.map(_act, [("fail",), ("well",)]))
    assert list(engine.map(_act, [("well",)])) == [(0, "well")]
    with pytest.raises(WorkerLostError, match=r"piece of work \(0\) lost 3 workers"):
        list(engine.map(_act, [("die",)]))
