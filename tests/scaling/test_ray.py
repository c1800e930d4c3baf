"""The Ray engine: the same bytes as the local one for any number of workers, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import byte_tokenizers
import gguf_files
import psutil
import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

import studies
from cells import Run
from softmeet import Ensemble
from softmeet.cli.main import app as commands
from softmeet.errors import InvalidInputError, NonFiniteError, WorkerLostError
from softmeet.evaluation.choices import parse_choices, with_baselines
from softmeet.evaluation.documents import Document
from softmeet.evaluation.files import PieceCache
from softmeet.evaluation.fit import Options, fit
from softmeet.evaluation.perplexity import distinct_names, evaluate_positions, evaluate_text
from softmeet.evaluation.positions import observe_text
from softmeet.evaluation.report import summary
from softmeet.evaluation.save import figures
from softmeet.evaluation.trace import record
from softmeet.scaling.local import LocalEngine
from softmeet.scaling.packing import pack, parts, unpack
from studies.known_truth import KnownTruthStudy
from studies.text import TextStudy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray.cluster_utils import Cluster

    from softmeet.scaling import ray_engine
    from softmeet.scaling.cluster import connect
    from softmeet.scaling.ray_engine import RayEngine

# Workers cannot import tests, nor what the study of the benchmarks is made of.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
ray.cloudpickle.register_pickle_by_value(studies)
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
def cluster():
    """Two nodes, each with an object store of its own."""
    made = Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={"num_cpus": 4, "num_gpus": 3, "object_store_memory": 1 << 28, "include_dashboard": False},
    )
    made.add_node(num_cpus=4, num_gpus=3, object_store_memory=1 << 28)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def engine(cluster, ensemble):
    """Three workers that have the ensemble."""
    with RayEngine(ensemble, 3) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(cluster):
    """Two without, which begin in half the time, and have halves of devices that are there in name only."""
    with RayEngine(None, 2, gpus=0.5) as engine:
        yield engine


def processes(engine):
    """Those of the workers, once all of them are ready."""
    return [ray.get(slot.actor.process.remote(), timeout=120) for slot in engine._slots]


@pytest.fixture(autouse=True)
def _nothing_was_redone(request):
    """Each test has a count of its own of what its engine began again."""
    for name in ("engine", "plain"):
        if name in request.fixturenames:
            request.getfixturevalue(name).redone.clear()


def evaluated(ensemble, engine, **options):
    """The reduced JSON; both gates are closed at some positions."""
    gated = ",".join(f"meet:trust=0.5:gate={gate}" for gate in ("disagreement:0.1", "unsure:0.2", "movement:0.002"))
    choices = parse_choices(["logit-mean", "meet:trust=0.5", *gated.split(",")], 2)
    return json.dumps(summary(evaluate_text(ensemble, DOCUMENTS, choices, engine=engine, **options)))


@pytest.fixture(scope="module")
def expected(ensemble):
    with LocalEngine() as engine:
        return evaluated(ensemble, engine)


def test_threads_of_one_process_agree(ensemble, expected):
    with LocalEngine(3) as engine:
        assert evaluated(ensemble, engine) == expected


def test_an_evaluation_is_the_same_to_the_last_byte(engine, ensemble, expected):
    """With three workers; with one in a later test."""
    assert evaluated(ensemble, engine) == expected
    assert engine.redone == []


def test_no_more_is_under_way_than_there_are_workers(plain):
    """Items are taken from their iterable as there is room for them, however slow the caller is."""
    taken = []

    def items():
        for k in range(20):
            taken.append(k)
            yield (str(k),)

    for count, _ in enumerate(plain.map(_act, items()), 1):
        # Done, under way, and one for each worker to choose from.
        assert len(taken) <= count + 2 * plain.workers
    assert len(taken) == 20


def _devices(model):
    return ray.get_gpu_ids()


def test_workers_share_a_device_or_have_several(plain, ensemble):
    """Devices that are there in name only: what is tested is who gets which."""
    from softmeet.scaling import worker

    given = [tuple(ray.get(s.actor.__ray_call__.remote(_devices))) for s in plain._slots]
    assert all(len(own) == 1 for own in given)
    assert given[0] == given[1]
    with RayEngine(None, 1, gpus=2) as engine:
        assert len(ray.get(engine._slots[0].actor.__ray_call__.remote(_devices))) == 2
    moved = unpack(pack(ensemble)[0])
    worker.spread(moved, [torch.device("meta")] * 2)
    assert all(weight.is_meta for member in moved.model.members for weight in member.parameters())
    with pytest.raises(InvalidInputError, match="part of one device or a whole number"):
        RayEngine(None, gpus=1.5)


def _look(model, seconds):
    """(process, node, where in which file of shared memory the head lies, what reading all weights added, their sum).

    What was added is of the memory that is this process's own.
    """
    head, own = model.heads[0].weight, psutil.Process()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode, *path = line.split()
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= head.data_ptr() < high:
            break
    before = own.memory_full_info().uss
    total = sum(weight.sum().item() for weight in model.parameters())
    added = own.memory_full_info().uss - before
    time.sleep(seconds)
    place = path[0].startswith("/dev/shm"), device, inode, int(offset, 16) + head.data_ptr() - low
    return os.getpid(), ray.get_runtime_context().get_node_id(), place, added, total


def test_weights_lie_once_on_each_node(engine, ensemble):
    size = sum(weight.nbytes for weight in ensemble.model.parameters())
    processes(engine)
    found = [answer for _, answer in engine.map(_look, [(ensemble.model, 0.5)] * 6)]
    assert all(not array.flags.writeable for array in ray.get(engine._packed)[1])
    assert len({process for process, *_ in found}) == 3
    places = {(node, place) for _, node, place, _, _ in found}
    assert len({node for node, _ in places}) == 2
    assert len(places) == 2  # the same bytes of the same file for all workers of a node
    assert all(place[0] for _, place in places)
    assert all(added < size / 10 for *_, added, _ in found)
    assert len({total for *_, total in found}) == 1


def test_workers_evaluate_an_ensemble_that_they_do_not_have(engine, folders, tmp_path):
    tokenizer, files = byte_tokenizers.byte_level(), [tmp_path / f"{k}.gguf" for k in range(2)]
    for file in files:
        config = LlamaConfig(**{**tiny.SMALL, "vocab_size": len(tokenizer)})
        gguf_files.write(file, LlamaForCausalLM(config), tokenizer, pre="gpt-2")
    for members, exact in ((folders[::-1], True), (files, False)):
        other = Ensemble.from_pretrained(members, "meet")
        with LocalEngine() as local:
            found, expected = evaluated(other, engine), evaluated(other, local)
        assert found == expected or not exact
        # llama.cpp may round otherwise in another process.
        each = [[own["nll"] for own in json.loads(one)["rules"].values()] for one in (found, expected)]
        assert each[0] == pytest.approx(each[1], abs=1e-5)


def test_packing_gives_the_same_tensors_back(ensemble):
    shared, odd = parts(ensemble), torch.arange(40.0)[3:]
    value = {
        "odd": odd,
        "model": ensemble.model,
        "head": ensemble.model.heads[0],
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    value |= {"empty": torch.zeros(0, 4), "slice": torch.arange(12.0).view(3, 4)[1:, ::2], "x": [1]}
    packed, _ = pack(value, shared)
    assert sum(array.nbytes for array in packed[1]) < 300  # no weight among them
    found = unpack(packed, shared)
    assert found["model"] is ensemble.model
    assert found["head"] is ensemble.model.heads[0]
    # Products of a tensor that lies elsewhere within a line of the cache may round differently.
    assert found["odd"].data_ptr() % 64 == odd.data_ptr() % 64 == 12
    for key in ("half", "empty", "slice", "odd"):
        assert torch.equal(found[key], value[key])
        assert found[key].dtype == value[key].dtype
    copy = unpack(*pack(ensemble)[:1])
    assert copy.model.heads[0].weight is copy.model.members[0].get_output_embeddings().weight
    assert [torch.equal(a, b) for a, b in zip(parts(copy)[-9:], shared[-9:], strict=True)] == [True] * 9
    # A member whose embeddings are tied has them once.
    assert copy.model.members[0].get_input_embeddings().weight is copy.model.heads[0].weight


def test_positions_fits_and_studies_are_the_same(engine, ensemble, tmp_path):
    options = Options(meet_positions=60, premise_positions=40, evaluations=3)
    parsed = parse_choices(["meet:trust=0.5", "logit-mean:prompt_weights=20"], 2)

    def everything(engine, folder):
        traced = record(ensemble, DOCUMENTS, folder / "trace", max_per_document=40, engine=engine)
        positions = traced.read()
        scores = summary(evaluate_positions(ensemble, positions, with_baselines(parsed), engine=engine))
        fitted = figures(fit(ensemble, positions, options, engine=engine, cache=PieceCache(folder / "fit", {})))
        study = TextStudy(12, 8, 4, 2, rows=4, sizes=(1,), prompt="the ", tokens=3, premise=0)
        results = Run(folder / "text", {}).each(dict(study.cells(ensemble, positions)), engine)
        return json.dumps([scores, fitted, results])

    with LocalEngine() as local:
        ours = everything(local, tmp_path / "local")
    assert everything(engine, tmp_path / "ray") == ours
    for folder in ("trace", "fit"):
        local, there = (sorted((tmp_path / name / folder).iterdir()) for name in ("local", "ray"))
        assert [p.name for p in local] == [p.name for p in there]
        assert [p.read_bytes() for p in local] == [p.read_bytes() for p in there]


def test_over_bytes_everything_is_the_same(engine, tmp_path):
    """Scores, costs, traces and fits; a copy's readers read the weights of its own members."""
    members = Ensemble.from_pretrained("mixed")
    choices = with_baselines(parse_choices(["logit-mean", "prob-mean:weights=0.3/0.7"], 2))
    documents = [Document(f"d{k}", WORDS[k:]) for k in range(8)]

    def everything(engine, folder):
        scores = summary(evaluate_text(members, documents, choices, engine=engine))
        positions = record(members, documents, folder / "trace", max_per_document=30, engine=engine).read()
        fitted = figures(fit(members, positions, Options(evaluations=3), engine=engine))
        return json.dumps([scores, fitted])

    with LocalEngine() as local:
        ours = everything(local, tmp_path / "local")
    assert everything(engine, tmp_path / "ray") == ours
    assert engine.redone == []
    local, there = (sorted((tmp_path / name / "trace").iterdir()) for name in ("local", "ray"))
    assert [path.name for path in local] == [path.name for path in there]
    assert [path.read_bytes() for path in local] == [path.read_bytes() for path in there]
    copy = unpack(*pack(members)[:1])
    for reader, member in zip(copy.model.readers, copy.model.members, strict=True):
        assert reader.model is member
        assert reader.head.weight is member.get_output_embeddings().weight


def test_a_study_of_heads_is_the_same(engine, tmp_path):
    study = KnownTruthStudy(positions=2, rows=2, documents=1, sizes=(2,))
    documents = [Document("text", "And it came to pass, when men began. " * 8)]
    cells = dict(study.cells(documents, study.load()))
    with LocalEngine() as local:
        ours = Run(tmp_path / "local", {}).each(cells, local)
    assert json.dumps(Run(tmp_path / "ray", {}).each(cells, engine)) == json.dumps(ours)


def test_a_fit_goes_on_where_it_stopped(ensemble, tmp_path):
    positions = observe_text(ensemble, DOCUMENTS, max_per_document=40)
    options = Options(meet_positions=40, premise_positions=40, evaluations=3)
    whole = figures(fit(ensemble, positions, options))

    def stop(description, done, total):
        if description == "fitting meet":
            raise KeyboardInterrupt
        return lambda count: None

    with pytest.raises(KeyboardInterrupt):
        fit(ensemble, positions, options, stop, cache=PieceCache(tmp_path, {}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    averages = {"logit-mean", "prob-mean", "power-mean"}
    assert {path.name.rpartition("-")[0] for path in before} == {"member-0", "member-1", *averages}
    begun, advanced = [], []

    def begin(description, done, total):
        begun.append(description)
        return lambda count: advanced.append(description)

    assert figures(fit(ensemble, positions, options, begin, cache=PieceCache(tmp_path, {}))) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fits = {f"fitting {name}" for name in (*distinct_names(ensemble), *averages)}
    assert fits < set(begun)
    assert not fits & set(advanced)
    with pytest.raises(InvalidInputError, match="pieces of a command with other settings"):
        PieceCache(tmp_path, {"trust": 1})


def command(*arguments):
    return [sys.executable, "-m", "softmeet.cli.main", *map(str, arguments)]


def killed_after(arguments, pattern, folder, count):
    """Run a command and kill it when so many files are there; which these are, with their times."""
    process = subprocess.Popen(
        command(*arguments), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_a_command_goes_on_after_its_driver_was_killed(cluster, ensemble, folders, tmp_path):
    documents = [Document(f"{tmp_path / 'all.txt'}#{k}", WORDS[k:]) for k in range(24)]
    (tmp_path / "all.txt").write_text("|".join(document.text for document in documents))
    asked = [
        "evaluate",
        *tiny.each("-m", folders),
        "--text",
        tmp_path / "all.txt",
        "--separator",
        "|",
        "--rule",
        "meet",
    ]
    asked += ["--engine", "ray", "--workers", 1, "--ray-address", cluster.address]
    asked += ["--resume", tmp_path / "pieces", "--json", tmp_path / "ray.json"]
    before = killed_after(asked, "*.safetensors", tmp_path / "pieces", 5)
    assert 5 <= len(before) < 24
    CliRunner().invoke(commands, list(map(str, asked)), catch_exceptions=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    choices = with_baselines(parse_choices(["meet"], 2))
    with LocalEngine(2) as engine:
        local = summary(evaluate_text(ensemble, documents, choices, engine=engine))
    found = json.loads((tmp_path / "ray.json").read_text())
    assert found.pop("run")["rules"]["threads"] == 1
    assert found == json.loads(json.dumps(local))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "dask"], "unknown engine 'dask': expected one of local, ray"),
        (["--gpus", "1"], "are options of --engine ray"),
    ],
)
def test_engines_that_are_none(folders, tmp_path, options, message):
    (tmp_path / "a.txt").write_text(WORDS)
    asked = ["evaluate", *tiny.each("-m", folders), "--text", str(tmp_path / "a.txt"), *options]
    with pytest.raises(InvalidInputError, match=message):
        CliRunner().invoke(commands, asked, catch_exceptions=False)


def test_no_cluster_at_an_address(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(InvalidInputError, match=r"expected a Ray cluster at 127\.0\.0\.1:1, found none"):
        connect("127.0.0.1:1")


# Last, since the workers that replace others are not waited for then.


def test_a_worker_that_is_killed_changes_nothing(engine, ensemble, expected):
    """It is stopped before it gets its piece, so that it surely has one when it is killed."""
    victim = processes(engine)[0]
    os.kill(victim, signal.SIGSTOP)
    pieces = []

    def advance(count):
        pieces.extend([count] * bool(count))  # at first, none was stored
        if len(pieces) == 1:
            os.kill(victim, signal.SIGKILL)

    assert evaluated(ensemble, engine, begin=lambda total: advance) == expected
    assert len(pieces) == len(DOCUMENTS)
    assert len(engine.redone) == 1


def _begin(k, folder):
    """The first that begins the last item kills its own process; then the number of the one that did the item."""
    (folder / "begun").open("a").write(f"{k}\n")
    if k == 11 and (folder / "kill").exists():
        (folder / "kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def test_what_was_under_way_is_begun_twice_and_nothing_else_is(plain, tmp_path, monkeypatch):
    """By a worker that has nothing to do: nobody waits for the dead one's place to be taken."""
    (tmp_path / "kill").touch()
    said, before = [], processes(plain)
    monkeypatch.setattr(plain, "_on_loss", said.append)
    done = dict(plain.map(_begin, [(k, tmp_path) for k in range(12)]))
    assert sorted(done) == list(range(12))
    assert set(done.values()) <= set(before)
    assert sorted((tmp_path / "begun").read_text().split()) == sorted([*map(str, range(12)), "11"])
    assert plain.redone == [11]
    assert len(said) == 1
    assert "done again" in said[0]


def _act(what):
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise NonFiniteError("NaN from a member")
    return what


def test_what_kills_every_worker_is_named_and_errors_are_the_calls_own(plain, monkeypatch):
    monkeypatch.setattr(ray_engine, "_TRIES", 2)
    with pytest.raises(NonFiniteError, match="NaN from a member"):
        list(plain.map(_act, [("fail",), ("well",)]))
    assert list(plain.map(_act, [("well",)])) == [(0, "well")]
    with pytest.raises(WorkerLostError, match=r"piece of work \(0\) lost 2 workers"):
        list(plain.map(_act, [("die",)]))
    assert plain.redone == [0, 0]
