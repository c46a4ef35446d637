"""Batches of an epoch that elastic training has interrupted."""

# In the place of True in `model.stop_training`: the epoch is over, training is not.
_END_OF_EPOCH = "the end of a shortened epoch"


class UpdateBatchStateCallbackImpl:
    """Keeps `state.batch`: how many batches of its epoch are done, 0 between epochs.

    An epoch that begins with `state.batch` above 0 goes on from there: it is shortened by that many
    steps. The number of steps per epoch must be known: raises ValueError where it is not.
    """

    def __init__(self, backend, state, *args):
        super().__init__(*args)
        self.backend = backend
        self.state = state
        self._before = 0  # batches of the epoch that were done when it began here
        self._nothing = False

    def on_train_begin(self, logs=None):
        if not self.params.get("steps"):
            raise ValueError(
                "UpdateBatchStateCallback cannot tell the number of steps per epoch from this "
                "data: give steps_per_epoch to fit."
            )

    def on_epoch_begin(self, epoch, logs=None):
        self._before = self.state.batch
        self._nothing = self._before >= self.params["steps"]
        if self._nothing:  # the interrupt came after the last batch: only the epoch's end is left
            model, step = self.model, self.model.train_function

            def no_step(iterator):
                model.train_function = step
                return {}

            model.train_function = no_step

    def on_batch_end(self, batch, logs=None):
        steps = self.params["steps"]
        if not self._nothing:
            self.state.batch = min(self._before + batch + 1, steps)
        if self._before and self.state.batch >= steps and not self.model.stop_training:
            self.model.stop_training = _END_OF_EPOCH

    def on_epoch_end(self, epoch, logs=None):
        self.state.batch = 0
        if self.model.stop_training is _END_OF_EPOCH:
            self.model.stop_training = False
