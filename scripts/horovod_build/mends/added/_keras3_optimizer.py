"""Horovod's distributed optimizers for Keras 3 on TensorFlow.

`distribute` makes an optimizer reduce its gradients over the ranks. It stays the object it was, with
its slots, its iterations and what is excluded from weight decay: only its class changes, to a
subclass that reduces where Keras clips. Every way to apply gradients leads there (fit,
train_on_batch, apply, apply_gradients), after local accumulation and before clipping, weight decay
and averages of the weights. Saved, it is the optimizer it was: a file loads without Horovod.
"""

import collections
import functools
import itertools
import os
import re

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
from horovod import _keras3
from horovod.common.util import split_list
from horovod.tensorflow import mpi_ops
from keras.src import api_export
from keras.src.saving import object_registration
from keras.src.trainers import trainer
from tensorflow.python.ops import control_flow_util

JIT = (
    "Horovod's operations can't be compiled by XLA. Compile the model with "
    "jit_compile=False (or 'auto'), or call tf.function without jit_compile."
)

# Ranks find each other's reductions by name. It has a number in it, as two optimizers of one
# kind can be at work at once; names that Keras or TensorFlow give may differ among ranks.
_numbers = collections.defaultdict(itertools.count)

Options = collections.namedtuple(
    "Options",
    "name device_dense device_sparse compression sparse_as_dense gradient_predivide_factor op "
    "groups process_set scale_local_gradients factor",
)


def distribute(
    optimizer,
    name,
    device_dense,
    device_sparse,
    compression,
    sparse_as_dense,
    gradient_predivide_factor,
    op,
    backward_passes_per_step,
    average_aggregated_gradients,
    groups,
    process_set,
    scale_local_gradients,
):
    """Makes the Keras 3 `optimizer` reduce its gradients over the ranks, and returns it.

    Of a LossScaleOptimizer it is the inner optimizer that becomes distributed, of a MultiOptimizer
    each of its optimizers. The arguments are those of hvd.DistributedOptimizer;
    `backward_passes_per_step` becomes Keras's gradient_accumulation_steps. Raises ValueError where
    they contradict each other or the optimizer.
    """
    if keras.backend.backend() != "tensorflow":
        raise _keras3.Keras3NotSupported(
            f"hvd.DistributedOptimizer needs Keras on TensorFlow, not on {keras.backend.backend()}. "
            "Set KERAS_BACKEND=tensorflow before Keras is imported."
        )
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(inner, _Distributed):
        raise ValueError(
            "The optimizer is distributed already: hvd.DistributedOptimizer changes the optimizer "
            "that it is given. Wrap it once."
        )
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError("op can be hvd.Average or hvd.Sum for a Keras optimizer")
    if gradient_predivide_factor != 1.0 and op != hvd.Average:
        raise ValueError("gradient_predivide_factor needs op=hvd.Average")
    factor = 1
    if backward_passes_per_step > 1:
        _accumulate(inner, backward_passes_per_step)
        factor = 1 if average_aggregated_gradients else backward_passes_per_step
    elif backward_passes_per_step < 1:
        raise ValueError(
            f"backward_passes_per_step is {backward_passes_per_step}, but must be at least 1"
        )
    _teach_keras()
    _change_class(
        inner,
        Options(
            re.sub(r"[^a-zA-Z0-9_.]", "_", name or f"Distributed{type(inner).__name__}"),
            device_dense,
            device_sparse,
            compression,
            sparse_as_dense,
            gradient_predivide_factor,
            op,
            groups,
            process_set,
            scale_local_gradients,
            factor,
        ),
    )
    return optimizer


def keep_local(optimizer, layers):
    """Lets the distributed `optimizer` leave the gradients of `layers` unreduced."""
    getattr(optimizer, "inner_optimizer", optimizer).horovod.local_layers.extend(layers)


def reduction_of(optimizer):
    """The Reduction of a distributed optimizer, or of the one that a LossScaleOptimizer wraps; None
    of any other."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return optimizer.horovod if isinstance(optimizer, _Distributed) else None


def _accumulate(optimizer, steps):
    """Lets Keras accumulate gradients over `steps` calls of `apply`."""
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "backward_passes_per_step does not work with a MultiOptimizer. Give each of its "
            "optimizers gradient_accumulation_steps."
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            f"The optimizer has gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps}: leave out backward_passes_per_step"
        )
    if optimizer.built:
        raise ValueError(
            "backward_passes_per_step needs an optimizer that is not built yet: Keras makes the "
            "accumulators when it builds it. Give gradient_accumulation_steps where you make it."
        )
    optimizer.gradient_accumulation_steps = steps


def _change_class(optimizer, options):
    """Makes a subclass of the class of `optimizer` the class of it."""
    base = type(optimizer)
    several = isinstance(optimizer, keras.optimizers.MultiOptimizer)
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(base, name) for name in names}
    namespace["_horovod_options"] = options
    parent = _DistributedMulti if several else _DistributedOne
    cls = type(base.__name__, (parent, base), namespace)
    # Keras looks up here what to write for the class when it saves it.
    public = api_export.get_name_from_symbol(base)
    if public is not None:
        api_export.REGISTERED_OBJS_TO_NAMES[cls] = public
    if base in object_registration.GLOBAL_CUSTOM_NAMES:
        registered = object_registration.GLOBAL_CUSTOM_NAMES[base]
        object_registration.GLOBAL_CUSTOM_NAMES[cls] = registered
    object.__setattr__(optimizer, "__class__", cls)
    if several and optimizer.built:
        optimizer._distribute_each()


class _Distributed:
    """What every distributed optimizer has."""

    @property
    def horovod(self):
        """The Reduction that this optimizer's gradients go through."""
        if "_horovod" not in self.__dict__:
            object.__setattr__(self, "_horovod", Reduction(self._horovod_options))
        return self._horovod

    def register_local_var(self, var):
        """Leaves the gradient of a variable unreduced."""
        self.horovod.local_variables.add(_keras3.tf_variable(var).ref())


class _DistributedOne(_Distributed):
    """Reduces the gradients where Keras clips them, after accumulating and before all else."""

    def apply(self, grads, trainable_variables=None):
        self.horovod.reduced = False
        super().apply(grads, trainable_variables)
        only_accumulated = self.gradient_accumulation_steps and tf.executing_eagerly()
        variables = trainable_variables or self._trainable_variables
        reducible = not all(self._overwrite_variable_with_gradient(v) for v in variables)
        if len(grads) and reducible and not self.horovod.reduced and not only_accumulated:
            raise RuntimeError(
                f"{type(self).__name__} applied gradients that were not reduced: it must call "
                "_clip_gradients of keras.Optimizer, where this is done."
            )

    def _overwrite_variables_directly_with_gradients(self, grads, vars):
        # The scales of 8-bit floats: Keras accumulates them by their maximum too.
        grads = [
            self.horovod.maximum(g, i) if self._overwrite_variable_with_gradient(v) else g
            for i, (g, v) in enumerate(zip(grads, vars, strict=True))
        ]
        return super()._overwrite_variables_directly_with_gradients(grads, vars)

    def _backend_apply_gradients(self, grads, trainable_variables):
        self.horovod.variables = list(trainable_variables)
        super()._backend_apply_gradients(grads, trainable_variables)

    def _clip_gradients(self, grads):
        self.horovod.reduced = True
        return super()._clip_gradients(self.horovod(list(grads), self.horovod.variables))


class _DistributedMulti(_Distributed):
    """Distributes the optimizers that it hands gradients to, which it may get to know when built."""

    def build(self, var_list):
        super().build(var_list)
        self._distribute_each()

    def _distribute_each(self):
        for optimizer in self.optimizers:
            if not isinstance(optimizer, _Distributed):
                _change_class(optimizer, self._horovod_options)
            optimizer.horovod.local_layers = self.horovod.local_layers
            optimizer.horovod.local_variables = self.horovod.local_variables


class Reduction:
    """Reduces gradients over the ranks of a process set, as `options` say.

    Names are given to all operations, and are the same on every rank: those that TensorFlow makes
    up depend on what else was traced.
    """

    def __init__(self, options):
        self.options = options
        self.name = f"{options.name}.{next(_numbers[options.name])}"
        self.local_variables = set()  # references
        self.local_layers = []
        self.variables = None  # those whose gradients are being applied
        self.reduced = False  # whether they went through here
        self._traced = {}

    def __call__(self, gradients, variables):
        """The reduced `gradients` of `variables`, in their order; those of local variables divided
        by the number of ranks, unless scale_local_gradients is False."""
        refs = [_keras3.tf_variable(v).ref() for v in variables]
        local = {_keras3.tf_variable(v).ref() for x in self.local_layers for v in x.weights}
        local |= self.local_variables
        shared = [i for i, ref in enumerate(refs) if ref not in local]
        groups = self.options.groups or 1
        if isinstance(groups, int):
            grouped = split_list(shared, min(groups, len(shared))) if shared else []
        else:
            wanted = [{_keras3.tf_variable(v).ref() for v in group} for group in groups]
            grouped = [[i for i in shared if refs[i] in group] for group in wanted]
            grouped += [[i] for i in shared if not any(refs[i] in group for group in wanted)]
        places = tuple(tuple(group) for group in grouped if group)
        return self._in_graph(self._reduce, gradients, places)

    def agree(self, finite):
        """Whether the boolean tensor `finite` is true on every rank."""
        return self._in_graph(self._agree, tf.convert_to_tensor(finite))

    def maximum(self, gradient, place):
        """The maximum over the ranks of each element of the gradient at `place`."""
        return self._in_graph(self._maximum, tf.convert_to_tensor(gradient), place)

    def _in_graph(self, function, *arguments):
        """`function` of the arguments in the graph that is being traced, or in one of its own, as
        operations have names in graphs only."""
        if tf.executing_eagerly():
            if function.__name__ not in self._traced:
                traced = tf.function(function, autograph=False, reduce_retracing=True)
                self._traced[function.__name__] = traced
            return self._traced[function.__name__](*arguments)
        if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise _keras3.Keras3NotSupported(JIT)
        return function(*arguments)

    def _size(self):
        """The number of ranks, a tensor in an elastic job, where it changes."""
        process_set = self.options.process_set
        return hvd.size_op(process_set.process_set_id) if _elastic() else process_set.size()

    def _where_several(self, function, tensors):
        """`function` of `tensors` where this rank has others to reduce with, else `tensors`."""
        process_set = self.options.process_set
        if not _elastic():
            several = process_set.included() and process_set.size() > 1
            return function(tensors) if several else tensors
        with tf.device("cpu"):
            included = hvd.process_set_included_op(process_set.process_set_id)
            several = tf.logical_and(tf.equal(included, 1), tf.greater(self._size(), 1))
        return tf.cond(several, lambda: function(tensors), lambda: tensors)

    def _allreduce(self, tensor, op, name):
        return hvd.allreduce(
            tensor,
            op=op,
            name=f"{self.name}.{name}",
            ignore_name_scope=True,
            process_set=self.options.process_set,
        )

    def _agree(self, finite):
        # A sum, as a rank that has joined (hvd.join) takes part with zeros.
        def total(flag):
            return self._allreduce(flag, hvd.Sum, "not_finite")

        flag = tf.cast(tf.logical_not(finite), tf.int32)
        return tf.equal(self._where_several(total, flag), 0)

    def _maximum(self, gradient, place):
        def greatest(tensor):
            return self._allreduce(tensor, hvd.Max, f"maximum_{place}")

        return self._where_several(greatest, gradient)

    def _reduce(self, gradients, places):
        """The `gradients`, of which those at each group of `places` are reduced together."""
        options = self.options
        if options.sparse_as_dense:
            gradients = [tf.convert_to_tensor(g) for g in gradients]
        if options.factor > 1:  # Keras has divided by the number of accumulated gradients
            gradients = [_scaled(g, options.factor) for g in gradients]
        return self._where_several(functools.partial(self._reduced, places), gradients)

    def _reduced(self, places, gradients):
        results = list(gradients)
        if self.options.scale_local_gradients:
            shared = {i for group in places for i in group}
            for i in set(range(len(gradients))) - shared:
                results[i] = _scaled(gradients[i], 1 / self._size())
        for number, group in enumerate(places):
            alike = collections.defaultdict(list)  # one operation takes tensors of one type
            for i in group:
                if isinstance(gradients[i], tf.IndexedSlices):
                    results[i] = self._gathered(gradients[i], i)
                else:
                    alike[gradients[i].dtype].append(i)
            for dtype, indices in alike.items():
                tensors = [gradients[i] for i in indices]
                reduced = self._grouped(tensors, f"gradients_{number}_{dtype.name}")
                for i, tensor in zip(indices, reduced, strict=True):
                    results[i] = tensor
        return results

    def _grouped(self, tensors, name):
        options = self.options
        dtype = tensors[0].dtype
        # Horovod's operations know no bfloat16; sums of it are better in single precision anyway.
        wide = tf.float32 if dtype == tf.bfloat16 else dtype
        reduced = hvd.grouped_allreduce(
            [tf.cast(t, wide) for t in tensors],
            device_dense=options.device_dense,
            compression=options.compression,
            op=options.op,
            prescale_factor=1 / options.gradient_predivide_factor,
            postscale_factor=options.gradient_predivide_factor,
            process_set=options.process_set,
            name=f"{self.name}.{name}",
            ignore_name_scope=True,
        )
        return [tf.cast(t, dtype) for t in reduced]

    def _gathered(self, slices, place):
        """The rows of every rank: their sum is that of the ranks' gradients."""
        dtype = slices.values.dtype
        wide = tf.float32 if dtype == tf.bfloat16 else dtype

        def gather(tensor, what):
            with tf.device(self.options.device_sparse):
                return mpi_ops.allgather(
                    tensor,
                    name=f"{self.name}.{what}_{place}",
                    ignore_name_scope=True,
                    process_set=self.options.process_set,
                )

        values = tf.cast(gather(tf.cast(slices.values, wide), "values"), dtype)
        indices = gather(slices.indices, "indices")
        gathered = tf.IndexedSlices(values, indices, slices.dense_shape)
        return _scaled(gathered, 1 / self._size()) if self.options.op == hvd.Average else gathered


def _elastic():
    return bool(int(os.environ.get("HOROVOD_ELASTIC", 0)))


def _scaled(gradient, factor):
    if isinstance(gradient, tf.IndexedSlices):
        values = _scaled(gradient.values, factor)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)


def _teach_keras():
    """Lets what Keras does around an optimizer take a distributed one into account.

    A LossScaleOptimizer, which Keras makes itself under mixed_float16, applies gradients where its
    own are finite. A rank that finds others than the rest would not take part in the reduction, and
    the rest would wait for it; so they agree on it. Keras compiles by XLA where there is a GPU.
    """
    loss_scale = keras.optimizers.LossScaleOptimizer
    if hasattr(loss_scale, "_horovod_taught"):
        return
    loss_scale._horovod_taught = True
    check_finite, resolve = loss_scale.check_finite, trainer.Trainer._resolve_auto_jit_compile

    @functools.wraps(check_finite)
    def check_all_finite(self, grads):
        reduction = reduction_of(self)
        finite = check_finite(self, grads)
        return finite if reduction is None else reduction.agree(finite)

    @functools.wraps(resolve)
    def resolve_auto_jit_compile(self):
        return reduction_of(getattr(self, "optimizer", None)) is None and resolve(self)

    loss_scale.check_finite = check_all_finite
    trainer.Trainer._resolve_auto_jit_compile = resolve_auto_jit_compile
