"""Our Horovod wheel on two ranks, through MPI and through Gloo: what works, what is mended, and
what it refuses under Keras 3.

Each launcher runs one job with all checks; this file is also the program that its ranks run. A rank
writes a line for each check that it passed; the tests read them.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

RANKS = 2
SECONDS = 100  # a job takes 10 to 20
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "mpi": [str(BIN / "mpirun"), "-np", "2"],
    "gloo": [str(BIN / "horovodrun"), "-np", "2", "--gloo"],
    "gloo-again": [str(BIN / "horovodrun"), "-np", "2", "--gloo"],
    "horovodrun-mpi": [str(BIN / "horovodrun"), "-np", "2", "--mpi"],
    "slow-cycle": [
        *(str(BIN / "mpirun"), "-np", "2"),
        *("-x", "HOROVOD_CYCLE_TIME=500", "-x", "HOROVOD_FUSION_THRESHOLD=4000"),
    ],
}


# ---------------------------------------------------------------------------- checks, in each rank


def torch_allreduce() -> None:
    import horovod.torch as hvd
    import torch

    for dtype in (
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float32,
        torch.float64,
    ):
        mine = torch.arange(5).to(dtype) + hvd.rank()
        total = hvd.allreduce(mine, op=hvd.Sum)
        assert total.dtype == dtype
        assert total.tolist() == [1, 3, 5, 7, 9]
    assert hvd.allreduce(torch.tensor([1.0, 3.0]) * hvd.rank()).tolist() == [0.5, 1.5]
    assert hvd.allreduce(torch.tensor([hvd.rank()]), op=hvd.Max).tolist() == [1]
    flat, one = hvd.grouped_allreduce([torch.ones(1000), torch.ones(1)], op=hvd.Sum)
    assert flat.sum() == 2000 and one.item() == 2


def torch_broadcast() -> None:
    import horovod.torch as hvd
    import torch

    assert hvd.broadcast(torch.tensor([7.0]) * hvd.rank(), root_rank=1).item() == 7
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(hvd.rank())
    hvd.broadcast_parameters(layer.state_dict(), root_rank=1)
    assert bool((layer.weight == 1).all())


def torch_zero_grad() -> None:
    """DistributedOptimizer averages, and its zero_grad takes set_to_none."""
    import horovod.torch as hvd
    import torch

    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=layer.named_parameters())
    layer(torch.full((1, 2), 1.0 + hvd.rank())).sum().backward()
    optimizer.step()
    assert layer.weight.tolist() == [[-1.5, -1.5]]
    optimizer.zero_grad(set_to_none=False)
    assert layer.weight.grad.tolist() == [[0.0, 0.0]]
    optimizer.zero_grad(set_to_none=True)
    assert layer.weight.grad is None


def torch_waits_asleep() -> None:
    """A rank that waits for another one takes no core from it."""
    import horovod.torch as hvd
    import torch

    hvd.barrier()
    if hvd.rank() == 1:
        time.sleep(1)
    begin = time.thread_time()
    hvd.allreduce(torch.ones(1))
    assert time.thread_time() - begin < 0.05


def torch_no_pause() -> None:
    """In a cycle of 0.5 s: what fills the fusion buffer does not wait for it, smaller ones do; nor
    does a rank begin another cycle's sleep while it waits for one that is later than that."""
    import horovod.torch as hvd
    import torch

    def seconds(elements: int, late: float = 0) -> float:
        hvd.barrier()
        begin = time.perf_counter()
        for _ in range(4):
            time.sleep(late * hvd.rank())
            hvd.allreduce(torch.ones(elements), name=f"of {elements}")
        return time.perf_counter() - begin

    assert seconds(1000) < 1.2 < seconds(999)
    assert seconds(1000, late=0.6) < 4 * 0.8


def torch_init_again() -> None:
    """Ranks leave and meet again, each time one of them late."""
    import horovod.torch as hvd
    import torch

    for times in range(10):
        hvd.shutdown()
        time.sleep(0.05 * ((times + int(os.environ["HOROVOD_RANK"])) % RANKS))
        hvd.init()
        assert hvd.allreduce(torch.ones(3), op=hvd.Sum).tolist() == [RANKS] * 3


def tensorflow_allreduce() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    for dtype in (tf.uint8, tf.int32, tf.int64, tf.float16, tf.float32, tf.float64):
        mine = tf.cast(tf.range(5), dtype) + tf.cast(hvd.rank(), dtype)
        total = hvd.allreduce(mine, op=hvd.Sum)
        assert total.dtype == dtype
        assert total.numpy().tolist() == [1, 3, 5, 7, 9]
    ours = tf.function(lambda x: hvd.allreduce(x, op=hvd.Average))
    assert ours(tf.constant([1.0, 3.0]) * hvd.rank()).numpy().tolist() == [0.5, 1.5]


def tensorflow_broadcast() -> None:
    """Keras 3 variables of the same name are broadcast too."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    assert hvd.broadcast(tf.constant([7.0]) * hvd.rank(), root_rank=1).numpy().tolist() == [7]
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    for place, weight in enumerate(model.weights):
        weight.assign(np.full(weight.shape, 10.0 * hvd.rank() + place))
    hvd.broadcast_variables(model.weights, root_rank=1)
    assert [float(w.numpy().max()) for w in model.weights] == [10, 11, 12, 13]


def _tape(make: Callable, sources: list) -> list[list[float]]:
    """The gradients of (rank + 1) × (the sum of each source × its place) through `make(tape)`."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            loss = sum((i + 1) * tf.reduce_sum(1.0 * s) for i, s in enumerate(sources))
            loss *= hvd.rank() + 1.0
        return make(tape).gradient(loss, sources)

    return [g.numpy().ravel().tolist() for g in gradients()]


def keras3_tape() -> None:
    """DistributedGradientTape and PartialDistributedGradientTape take Keras 3 variables."""
    import horovod.tensorflow as hvd
    import keras

    shared, local = keras.layers.Dense(1, use_bias=False), keras.layers.Dense(1, use_bias=False)
    shared.build((1, 1)), local.build((1, 1))
    sources = [shared.kernel, local.kernel]

    assert _tape(lambda t: hvd.DistributedGradientTape(t, op=hvd.Sum), sources) == [[3], [6]]

    def partial(tape):
        return hvd.PartialDistributedGradientTape(
            tape, op=hvd.Sum, local_layers=[local], scale_local_gradients=False
        )

    assert _tape(partial, sources) == [[3], [2 * (hvd.rank() + 1)]]


def groups_of_one_name() -> None:
    """Variables of one name, in groups, keep a gradient each; so do those in no group."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    plain = [tf.Variable([1.0], name="kernel") for _ in range(4)]
    layers = [keras.layers.Dense(1, use_bias=False) for _ in range(4)]
    for layer in layers:
        layer.build((1, 1))
    for sources in (plain, [layer.kernel for layer in layers]):
        for groups in (2, [sources[:2], sources[3:]], [sources]):

            def tape(inner, groups=groups):
                return hvd.DistributedGradientTape(inner, op=hvd.Sum, groups=groups)

            assert _tape(tape, sources) == [[3], [6], [9], [12]]


def sparse_beside_dense() -> None:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    values = tf.ones((1, 2)) * (hvd.rank() + 1)
    sparse = tf.IndexedSlices(values, tf.constant([hvd.rank()]), tf.constant([4, 2]))
    dense, reduced = hvd.grouped_allreduce([tf.ones(3), sparse], op=hvd.Sum)
    assert dense.numpy().tolist() == [2, 2, 2]
    assert tf.convert_to_tensor(reduced).numpy().tolist() == [[1, 1], [2, 2], [0, 0], [0, 0]]


def options_passed_on() -> None:
    """horovod.tensorflow hands `op` and `groups` to the Keras side."""
    import horovod.tensorflow as hvd
    import horovod.tensorflow.keras as hvd_keras

    real, hvd_keras.DistributedOptimizer = hvd_keras.DistributedOptimizer, lambda **given: given
    try:
        given = hvd.DistributedOptimizer(object(), op=hvd.Sum, groups=3)
    finally:
        hvd_keras.DistributedOptimizer = real
    assert (given["op"], given["groups"]) == (hvd.Sum, 3)


def advice_trains_alike() -> None:
    """What the refusals say to use works: ranks with other weights and data end with equal ones."""
    import horovod.tensorflow as hvd
    import keras
    import numpy as np
    import tensorflow as tf

    class Model(keras.Sequential):
        def train_step(self, data):
            inputs, targets = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=targets, y_pred=self(inputs, training=True))
            tape = hvd.DistributedGradientTape(tape)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    keras.utils.set_random_seed(hvd.rank())
    model = Model([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    hvd.broadcast_variables(model.weights, root_rank=0)
    hvd.broadcast_variables(model.optimizer.variables, root_rank=0)
    rng = np.random.default_rng(hvd.rank())
    before = model.get_weights()[0]
    model.fit(rng.normal(size=(16, 3)), rng.normal(size=(16, 1)), batch_size=4, verbose=0)
    assert np.abs(model.get_weights()[0] - before).max() > 0.01
    for weight in model.weights:
        both = hvd.allgather(tf.reshape(weight.value, (1, -1))).numpy()
        assert np.array_equal(both[0], both[1])


def refusals() -> None:
    """What can't work under TensorFlow 2 says what to use."""
    import horovod.keras
    import horovod.tensorflow.keras

    for module in (horovod.tensorflow, horovod.tensorflow.keras, horovod.keras):
        try:
            module.broadcast_global_variables(0)
        except RuntimeError as error:
            assert "broadcast_variables" in str(error)
        else:
            raise AssertionError("broadcast_global_variables was not refused")


def what_is_not_refused() -> None:
    """Refusals are for Keras 3 alone: TensorFlow's own optimizer of old is still wrapped."""
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from horovod import _keras3

    optimizer = tf.compat.v1.train.GradientDescentOptimizer(1.0)
    assert not _keras3.of_keras3(optimizer)
    variable = tf.Variable([1.0])
    pairs = hvd.DistributedOptimizer(optimizer, op=hvd.Sum).compute_gradients(
        lambda: (hvd.rank() + 1.0) * variable, [variable]
    )
    assert pairs[0][0].numpy().tolist() == [3]


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        torch_allreduce,
        torch_broadcast,
        torch_zero_grad,
        torch_waits_asleep,
        tensorflow_allreduce,
        tensorflow_broadcast,
        keras3_tape,
        groups_of_one_name,
        sparse_beside_dense,
        options_passed_on,
        advice_trains_alike,
        refusals,
        what_is_not_refused,
    )
}
OTHERS = {"torch_no_pause": torch_no_pause, "torch_init_again": torch_init_again}
JOBS = {
    "mpi": list(CHECKS),
    "gloo": list(CHECKS),
    "horovodrun-mpi": ["torch_allreduce"],
    "slow-cycle": ["torch_no_pause"],
    "gloo-again": ["torch_init_again"],
}


def main(folder: str, names: list[str]) -> None:
    """One rank: runs the checks in order, and writes a line for each that passed.

    TensorFlow comes in after torch's checks: loaded before them, it crashes the Triton of a CUDA
    build of torch, with or without Horovod.
    """
    import horovod.torch as hvd

    hvd.init()
    assert hvd.size() == RANKS
    controller = "mpi" if hvd.mpi_enabled() else "gloo"
    with Path(folder, f"rank-{hvd.rank()}.jsonl").open("w") as results:
        for name in names:
            if not name.startswith("torch"):
                import horovod.tensorflow

                horovod.tensorflow.init()
            (CHECKS | OTHERS)[name]()
            print(json.dumps([name, controller]), file=results, flush=True)


# ------------------------------------------------------------------------------ tests, outside it

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    sys.exit()

import pytest  # noqa: E402

if importlib.util.find_spec("horovod") is None:
    pytest.skip(
        "Horovod is not installed: scripts/build_horovod.py --install", allow_module_level=True
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Runs each launcher's job once: which ranks passed which checks, and the job's output."""
    done: dict[str, tuple[list[dict[str, str]], str]] = {}

    def run(launcher: str) -> tuple[list[dict[str, str]], str]:
        if launcher not in done:
            command = LAUNCHERS[launcher]
            if not Path(command[0]).exists():
                pytest.skip(f"{command[0]} is not installed")
            folder = tmp_path_factory.mktemp(launcher)
            done[launcher] = _run(
                [*command, sys.executable, __file__, str(folder)], launcher, folder
            )
        return done[launcher]

    return run


def _run(command: list[str], launcher: str, folder: Path) -> tuple[list[dict[str, str]], str]:
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PRTE_MCA_prte_local_tmpdir_base": str(folder),  # see horovod_build.ranks
    }
    limited = ["timeout", "--kill-after", "10", str(SECONDS), *command, *JOBS[launcher]]
    ended = subprocess.run(
        limited, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    passed = []
    for rank in range(RANKS):
        file = folder / f"rank-{rank}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        passed.append(dict(json.loads(line) for line in lines))
    return passed, f"exit code {ended.returncode}\n{ended.stdout[-5000:]}"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("launcher", ["mpi", "gloo"])
def test_on_two_ranks(job, launcher: str, check: str) -> None:
    passed, output = job(launcher)
    assert all(rank.get(check) == launcher for rank in passed), output


def test_horovodrun_with_mpi(job) -> None:
    passed, output = job("horovodrun-mpi")
    assert passed == [{"torch_allreduce": "mpi"}] * RANKS, output


def test_what_fills_the_fusion_buffer_is_not_kept_waiting(job) -> None:
    passed, output = job("slow-cycle")
    assert passed == [{"torch_no_pause": "mpi"}] * RANKS, output


def test_ranks_meet_again_over_gloo(job) -> None:
    passed, output = job("gloo-again")
    assert passed == [{"torch_init_again": "gloo"}] * RANKS, output


def test_a_late_rank_leaves_no_address_behind() -> None:
    """The server of horovodrun, in the order that occurs where rank 1 is slow."""
    from horovod.runner.common.util.hosts import SlotInfo
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    port = server.start()
    server.init([SlotInfo("here", rank, rank, 0, 2, 2, 1) for rank in range(2)])

    def ask(method: str, scope: str, key: int, data: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, f"/{scope}/{key}", data)
        return connection.getresponse().read()

    try:
        for rank in range(2):
            ask("PUT", "local_here", rank, b"address")
        assert ask("GET", "local_here", 1) == b"address"
        for rank in range(2):
            ask("DELETE", "local_here", rank)
            ask("PUT", f"cross_{rank}", 0, b"address")
            ask("DELETE", f"cross_{rank}", 0)
        for scope, rank in (("local_here", 0), ("local_here", 1), ("cross_0", 0), ("cross_1", 0)):
            assert ask("GET", scope, rank) == b"", scope
    finally:
        server.stop()


def test_wheel_says_what_it_is() -> None:
    """The version has our tag; the build's record can be read without importing Horovod."""
    assert metadata.version("horovod").startswith("0.28.1+lm")
    spec = importlib.util.find_spec("horovod")
    assert spec is not None and spec.origin is not None
    record = json.loads(Path(spec.origin).with_name("_lm_build.json").read_text())
    assert record["version"] == metadata.version("horovod")
    assert record["frameworks"]["torch"] == metadata.version("torch")
    assert set(record["mends"]) >= {"build/cpp17.py", "python/keras3_optimizer.py"}
