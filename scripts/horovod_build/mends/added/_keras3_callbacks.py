"""Horovod's callbacks for Keras 3.

`for_keras` puts classes of this module in the place of those of `horovod._keras.callbacks`, which
were written for the Keras before it; `part` adds to them.
"""

import hashlib
import warnings

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod import _keras3
from horovod._keras import callbacks as _impl

# Keras calls this once after the last batch of an epoch or of an evaluation, and nowhere else.
_READ = "_get_metrics_result_or_logs"


class Nothing:
    """A base class that adds nothing."""


def for_keras(keras, impl):
    """The class of this module with the name of `impl` if `keras` is Keras 3, else `impl`."""
    return globals()[impl.__name__] if _keras3.of_keras3(keras.callbacks.Callback) else impl


def part(keras, name):
    """The class `name` of this module if `keras` is Keras 3, else one that adds nothing."""
    return globals()[name] if _keras3.of_keras3(keras.callbacks.Callback) else Nothing


def tf_variables(variables):
    """The tf.Variables of one Keras 3 variable or of a collection of them; None stays None."""
    if variables is None or isinstance(variables, tf.Variable):
        return variables
    if _keras3.of_keras3(variables):
        return _keras3.tf_variable(variables)
    return [_keras3.tf_variable(v) for v in variables]


def meet(where, value=None):
    """The `value` of every rank. All must come to the same point of their training: raises
    RuntimeError on each where `where` differs."""
    if hvd.size() == 1:
        return [value]
    seen = hvd.allgather_object((where, value), name="horovod_keras3_meet")
    if len({at for at, _ in seen}) > 1:
        points = ", ".join(f"rank {rank}: {at}" for rank, (at, _) in enumerate(seen))
        raise RuntimeError(
            f"The ranks are not at the same point of their training ({points}). Each must be given "
            "the same epochs, validation and Horovod callbacks; one that stops early must stop on "
            "every rank: put MetricAverageCallback before EarlyStopping and its like."
        )
    return [value for _, value in seen]


def _alike(what, mine):
    """Raises ValueError on every rank if the lists `mine` of descriptions differ among ranks."""
    digests = meet(what, hashlib.sha256("\n".join(mine).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    lists = meet(what, mine)
    other = next(rank for rank, given in enumerate(lists) if given != lists[0])
    length = max(len(lists[0]), len(lists[other]))
    first, second = ([*given, *["nothing"] * length][:length] for given in (lists[0], lists[other]))
    place = next(i for i in range(length) if first[i] != second[i])
    raise ValueError(
        f"{what}: rank 0 and rank {other} do not have the same. Number {place + 1} is "
        f"{first[place]} on rank 0 and {second[place]} on rank {other}."
    )


# ------------------------------------------------------------------------- state of a model


def _inner(optimizer):
    """The optimizer that a LossScaleOptimizer wraps; any other as it is."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _build_optimizer(model):
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def _slots_of(optimizer, chosen):
    """The ids of what `optimizer` keeps for those of its variables that `chosen` holds true for."""
    inner = _inner(optimizer)
    places = [i for i, v in enumerate(inner._trainable_variables) if chosen(v)]
    lists = [
        kept
        for kept in vars(inner).values()
        if isinstance(kept, list) and len(kept) == len(inner._trainable_variables)
    ]
    return {id(kept[place]) for kept in lists for place in places}


def _state(model, local, accumulators=True):
    """What must be equal on all ranks: pairs of a description and a tf.Variable, in order.

    Not the state of random seeds, or dropout would be the same everywhere, nor the variables whose
    references are in `local` and what the optimizer keeps for them. A description has no path:
    names that Keras counts up may differ, above all where one rank has loaded its model.
    """

    def is_local(v):
        return _keras3.tf_variable(v).ref() in local

    state = [("weight", v.name, v) for v in model.weights if not is_local(v)]
    optimizer = model.optimizer
    if optimizer is not None:
        left_out = _slots_of(optimizer, is_local)
        if not accumulators:
            left_out |= {id(v) for v in getattr(_inner(optimizer), "_accumulated_gradients", ())}
        state += [
            (f"of {type(_inner(optimizer)).__name__}", "", v)
            for v in optimizer.variables
            if id(v) not in left_out
        ]
    return [
        (" ".join(filter(None, (kind, name, str(tuple(v.shape)), str(v.dtype)))), v.value)
        for kind, name, v in state
    ]


def _read_iterations(model):
    optimizer = model.optimizer
    return 0 if optimizer is None else int(_inner(optimizer)._iterations.numpy())


def _is_built(model):
    return all(layer.built for layer in model._flatten_layers())


def _batch_of(iterator):
    """The shapes and types of one batch of Keras's iterator, None where there is nothing."""
    return tf.nest.map_structure(
        lambda spec: spec if isinstance(spec, tf.TensorSpec) else None,
        iterator.element_spec,
        expand_composites=False,
    )


class BroadcastGlobalVariablesCallbackImpl:
    """Before the first step of each `fit`: the weights and the optimizer of one rank on all.

    The model is built from the shapes of its data and the optimizer for the model where they were
    not, so that a rank that resumes and ranks that start agree. Raises ValueError on all ranks if
    their models or optimizers do not have variables of the same shapes.
    """

    def __init__(self, backend, root_rank, device="", *args):
        super().__init__(*args)
        self.root_rank = root_rank
        self.device = device
        self.broadcast_done = False
        self._local_vars = set()

    def register_local_var(self, var):
        """Registers a variable as worker local: it is not broadcast, nor are its slots."""
        self._local_vars.add(_keras3.tf_variable(var).ref())

    def on_train_begin(self, logs=None):
        self.broadcast_done = False
        if self.model.jit_compile:
            warnings.warn(
                "XLA cannot compile Horovod's operations: the model is trained as if compiled "
                "with jit_compile=False.",
                stacklevel=2,
            )
            self.model.jit_compile = False
            self.model.make_train_function(force=True)
        super().on_train_begin(logs)

    def on_train_batch_begin(self, batch, logs=None):
        model = self.model
        if not self.broadcast_done and _is_built(model):
            self._broadcast()
        elif not self.broadcast_done:
            step = model.train_function

            def build_first(iterator):
                model.train_function = step
                self._build(iterator)
                self._broadcast()
                return step(iterator)

            model.train_function = build_first
        super().on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        if not self.broadcast_done:  # a `fit` of another's making, without Keras's train_function
            self._broadcast()
        super().on_train_batch_end(batch, logs)

    def _build(self, iterator):
        try:
            self.model._symbolic_build(data_batch=_batch_of(iterator))
        except Exception as error:
            raise RuntimeError(
                "BroadcastGlobalVariablesCallback could not build the model before its first step "
                f"({error}). Call it on a batch before fit."
            ) from error

    def _broadcast(self):
        _build_optimizer(self.model)
        state = _state(self.model, self._local_vars)
        _alike("Variables to broadcast", [description for description, _ in state])
        with tf.device(self.device):
            hvd.broadcast_variables([v for _, v in state], root_rank=self.root_rank)
        self.broadcast_done = True


# -------------------------------------------------------------------- the end of an epoch


class _Reading:
    """Stands for `model._get_metrics_result_or_logs` while callbacks have to do something first.

    `doing[order]` is called as (logs, read): it returns read(logs). Lower orders come first.
    """

    def __init__(self, model):
        self.model = model
        self.doing = {}

    def __call__(self, logs):
        def read(logs):
            return getattr(type(self.model), _READ)(self.model, logs)

        for order in sorted(self.doing, reverse=True):
            read = self._then(self.doing[order], read)
        return read(logs)

    @staticmethod
    def _then(do, read):
        return lambda logs: do(logs, read)


def _before_reading(model, order, do):
    """Has `do(logs, read)` called after the last batch of each epoch and evaluation of `model`."""
    reading = vars(model).get(_READ)
    if reading is None:
        reading = _Reading(model)
        object.__setattr__(model, _READ, reading)  # not one of the model's tracked attributes
    reading.doing[order] = do


def _before_reading_no_more(model, order):
    reading = vars(model).get(_READ)
    if reading is not None:
        reading.doing.pop(order, None)
        if not reading.doing:
            object.__delattr__(model, _READ)


_STEPS, _METRICS = 0, 1


class StepsTogether:
    """Part of BroadcastGlobalVariablesCallback: ranks end each epoch together, whatever the number
    of their batches.

    A rank that has no more joins: it adds zeros to what the others still reduce, and an average
    still divides by all ranks, so that every batch counts as much as any other. It then takes the
    weights and the optimizer of a rank that made every step. Each takes gradients that Keras has
    accumulated for a step to come along into the next epoch.
    """

    _stepping = False

    def on_train_begin(self, logs=None):
        _before_reading(self.model, _STEPS, self._end_together)
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        meet(f"the begin of epoch {epoch + 1}")
        self._stepping, self._batches = True, 0
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._batches = batch + 1
        super().on_train_batch_end(batch, logs)

    def on_train_end(self, logs=None):
        meet("the end of training")
        _before_reading_no_more(self.model, _STEPS)
        super().on_train_end(logs)

    def _end_together(self, logs, read):
        if self._stepping:
            self._stepping = False
            if not self.broadcast_done:
                raise ValueError(f"Rank {hvd.rank()} has no batch to train on: each needs one.")
            if hvd.size() > 1:
                int(hvd.join())
            made = meet("the last step", (_read_iterations(self.model), self._batches))
            if len(set(made)) > 1:
                state = _state(self.model, self._local_vars, accumulators=False)
                with tf.device(self.device):
                    hvd.broadcast_variables([v for _, v in state], root_rank=made.index(max(made)))
        return read(logs)


# ---------------------------------------------------------------------------------- metrics


def allreduce_metrics(model):
    """Makes the metrics of `model` those of all ranks' data, and returns their values by name.

    What each metric has counted is added up over the ranks, not its value averaged: shards of any
    size give what one rank would have found on all of it. To be called on every rank, once, after
    `evaluate` or a loop of one's own. A metric of one's own must make its variables with
    `add_variable`, whose `aggregation` ("sum" if none is given) says what ranks do with them.
    Raises ValueError where a variable does not say, or the ranks have other metrics.
    """
    _reduce_metrics(model.metrics)
    return {name: _number(value) for name, value in model.get_metrics_result().items()}


def _reduce_metrics(metrics):
    """Adds up the variables of `metrics` over the ranks, in fp64 and in the order of ranks."""
    variables = {id(v): (metric.name, v) for metric in metrics for v in metric.variables}
    for name, v in variables.values():
        if v.aggregation not in ("sum", "mean", "only_first_replica"):
            raise ValueError(
                f"The metric {name!r} has a variable {v.name!r} that does not say what becomes of "
                "it over several ranks: make it with add_variable(..., aggregation='sum')."
            )
    names = [f"{name} {v.name} {tuple(v.shape)} {v.dtype}" for name, v in variables.values()]
    _alike("Metrics to reduce", names)
    everyone = meet("metrics", [v.numpy() for _, v in variables.values()])
    for (_, v), values in zip(variables.values(), zip(*everyone, strict=True), strict=True):
        kind = values[0].dtype if np.issubdtype(values[0].dtype, np.integer) else np.float64
        total = np.sum([value.astype(kind) for value in values], axis=0)
        if v.aggregation == "mean":
            total = total / hvd.size()
        elif v.aggregation == "only_first_replica":
            total = values[0]
        v.assign(np.asarray(total).astype(values[0].dtype))


def _number(value):
    return float(np.asarray(value)) if np.ndim(value) == 0 else np.asarray(value)


class MetricAverageCallbackImpl:
    """The metrics of all ranks' data at the end of each epoch and evaluation, for every callback,
    `History`, the progress bar and what `evaluate` returns.

    What metrics have counted is added up (see `allreduce_metrics`), so that ranks may have batches
    of different sizes and numbers. Other numbers in the logs, which a `train_step` of one's own or
    a callback before this one has put there, are averaged. Raises on all ranks where the names
    differ, as they do if only one rank validates.
    """

    def __init__(self, backend, device="", *args):
        super().__init__(*args)
        self.device = device
        self._fitting = self._testing = self._due = False
        self._exact = set()

    def on_train_begin(self, logs=None):
        self._fitting = True
        _before_reading(self.model, _METRICS, self._over_ranks)
        super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        self._fitting = False
        _before_reading_no_more(self.model, _METRICS)
        super().on_train_end(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._due = True
        super().on_epoch_begin(epoch, logs)

    def on_test_begin(self, logs=None):
        self._testing = self._due = True
        _before_reading(self.model, _METRICS, self._over_ranks)
        super().on_test_begin(logs)

    def on_test_end(self, logs=None):
        self._testing = False
        if not self._fitting:
            _before_reading_no_more(self.model, _METRICS)
        super().on_test_end(logs)

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        logs.update(_averaged({k: v for k, v in logs.items() if k not in self._exact}))
        self._exact = set()
        super().on_epoch_end(epoch, logs)

    def _over_ranks(self, logs, read):
        if not self._due:  # an evaluation without this callback, in the midst of `fit`
            return read(logs)
        self._due = False
        _reduce_metrics(self.model.metrics)
        results = read(logs)
        if not logs:  # this rank had no batch
            results = self.model.get_metrics_result()
        if results is not logs:
            prefix = "val_" if self._fitting and self._testing else ""
            self._exact |= {prefix + name for name in results}
        elif not self._fitting:
            results = {**results, **_averaged(results)}
        return results


def _averaged(logs):
    """The mean over ranks of each number in `logs`."""
    mine = {name: float(value) for name, value in sorted(logs.items()) if np.ndim(value) == 0}
    _alike("Numbers in the logs", list(mine))
    everyone = meet("logs", mine) if mine else []
    return {name: float(np.mean([given[name] for given in everyone])) for name in mine}


# ----------------------------------------------------------------------------- learning rate


class _LearningRate:
    """Assigns `optimizer.learning_rate`, which must be a number, not a schedule of Keras.

    Momentum correction (Goyal et al. 2017, equation 11): the velocity of Keras's SGD and RMSprop is
    a sum of gradients times learning rates, so it is multiplied by new rate / old rate before the
    first step at a new rate. The optimizer's `momentum` is not touched: a compiled step would not
    see the change.
    """

    def on_train_begin(self, logs=None):
        rate = getattr(_inner(self.model.optimizer), "_learning_rate", None)
        if not _keras3.of_keras3(rate) or not hasattr(rate, "assign"):
            raise ValueError(
                f"{type(self).__name__} needs an optimizer whose learning_rate is a number; this "
                f"one's is a {type(rate).__name__}, which changes it already. Leave one of the two "
                "out."
            )
        if not self.staircase and not self.steps_per_epoch:
            # Agreed on, for a rank with fewer batches would have learning rates of its own.
            steps = meet("steps of an epoch", self.params.get("steps"))
            if None in steps:
                raise ValueError(
                    f"{type(self).__name__} cannot tell the number of steps per epoch from this "
                    "data: give steps_per_epoch to it."
                )
            self.steps_per_epoch = max(steps)

    def _adjust_learning_rate(self, epoch):
        optimizer = self.model.optimizer
        old_rate = _rate(optimizer)
        optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new_rate = _rate(optimizer)
        if self.momentum_correction and old_rate and new_rate != old_rate:
            for velocity in _velocities(optimizer):
                velocity.assign(velocity * (new_rate / old_rate))

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["lr"] = _rate(self.model.optimizer)


def _rate(optimizer):
    return float(np.asarray(optimizer.learning_rate))


def _velocities(optimizer):
    """The variables of `optimizer` that hold sums of gradients times learning rates."""
    import keras

    inner = _inner(optimizer)
    if not inner.built:
        return []
    if isinstance(inner, keras.optimizers.SGD):
        return inner.momentums
    return inner._momentums if isinstance(inner, keras.optimizers.RMSprop) else []


class LearningRateScheduleCallbackImpl(_LearningRate, _impl.LearningRateScheduleCallbackImpl):
    """The learning rate of each epoch or batch: see `_LearningRate`."""


class LearningRateWarmupCallbackImpl(_LearningRate, _impl.LearningRateWarmupCallbackImpl):
    """The learning rate of a warm-up: see `_LearningRate`."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if epoch == self.end_epoch - 1 and self.verbose > 0 and hvd.rank() == 0:
            rate = _rate(self.model.optimizer)
            print(f"\nEpoch {epoch + 1}: finished gradual learning rate warmup to {rate:g}.")


# -------------------------------------------------------------------------- best checkpoint


class SavesOnRank0:
    """Part of BestModelCheckpoint: `filepath` may be set later, and rank 0 alone writes."""

    def __init__(self, filepath=None, save_weights_only=False, **kwargs):
        ending = ".weights.h5" if save_weights_only else ".keras"
        super().__init__(
            filepath=filepath or f"set later{ending}", save_weights_only=save_weights_only, **kwargs
        )
        if filepath is None:
            self.filepath = None

    def _save_model(self, epoch, batch, logs):
        if self.filepath is None:
            raise ValueError("BestModelCheckpoint has no filepath: give it one.")
        if hvd.rank() == 0:
            super()._save_model(epoch, batch, logs)
