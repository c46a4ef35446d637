"""Let `hvd.load_model` load a Keras 3 model whose optimizer is distributed.

It registered wrapped optimizers under lower-case names, which Keras 3 never looks up: the model came
back with a plain optimizer, and nothing was reduced. The model is now loaded as any other, with the
slots and iterations of its optimizer, which is then wrapped.

https://github.com/horovod/horovod/issues/1920, https://github.com/horovod/horovod/issues/120
"""

LOAD = """    from horovod import _keras3
    if _keras3.of_keras3(keras.optimizers.Optimizer):
        objects = {cls.__name__: cls for cls in custom_optimizers or ()}
        objects.update(custom_objects or {})
        model = keras.models.load_model(filepath, custom_objects=objects)
        if getattr(model, 'optimizer', None) is not None:
            from horovod._keras3_optimizer import reduction_of
            if reduction_of(model.optimizer) is None:  # a custom class may have wrapped itself
                model.optimizer = wrap_optimizer(lambda: model.optimizer)()
            model.jit_compile = False  # which compiling has set for the plain optimizer
        return model

"""


def mend(source):
    anchor = "custom_optimizers, custom_objects, legacy_opts=False):\n"
    source.edit("horovod/_keras/__init__.py", anchor, anchor + LOAD)
