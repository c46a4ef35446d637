"""Let GradScaler unscale reduced gradients, whatever the order of calls.

`scaler.step(optimizer)` and `scaler.unscale_(optimizer)` divided gradients while they were being
reduced, and looked for infinities in each rank's own: a rank with an overflow skipped the step, the
other one took it with half-scaled gradients, and the next `zero_grad()` failed or the job hung.
Only `optimizer.synchronize()` first, then `unscale_`, then `step` under `skip_synchronize()` was
right. Now unscaling reduces first, so that this order is right and the short ones are the same:
each rank finds the same infinities, and takes or skips the step as all do. Adasum, which applies
gradients in the backward pass, is refused. See https://github.com/horovod/horovod/issues/3160,
https://github.com/horovod/horovod/issues/3181 and https://github.com/horovod/horovod/issues/2175.
"""

FILE = "horovod/torch/optimizer.py"
FIRST = '''def _reduced_first(unscale):
    """What unscales and looks for infinities in GradScaler, after the reduction."""
    @functools.wraps(unscale)
    def reduced_first(scaler, optimizer, *args, **kwargs):
        if type(optimizer).__module__ == __name__:
            if hasattr(optimizer, '_starting_models'):
                raise ValueError('GradScaler can not be used with op=hvd.Adasum, which applies '
                                 'gradients in the backward pass, before they are unscaled: use '
                                 'bfloat16, or op=hvd.Average.')
            optimizer.synchronize()
            optimizer._reduced_for_scaler = True  # step() need not warn
        return unscale(scaler, optimizer, *args, **kwargs)

    reduced_first.of_horovod = True
    return reduced_first


# All ways to unscale lead through this method; other optimizers' gradients pass as they are.
if not hasattr(torch.amp.GradScaler._unscale_grads_, 'of_horovod'):
    torch.amp.GradScaler._unscale_grads_ = _reduced_first(torch.amp.GradScaler._unscale_grads_)


'''


def mend(source):
    source.edit(
        FILE, "import os\nimport warnings\n", "import functools\nimport os\nimport warnings\n"
    )
    source.edit(
        FILE, "def DistributedOptimizer(optimizer,", f"{FIRST}def DistributedOptimizer(optimizer,"
    )
