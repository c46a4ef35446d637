"""Count epochs right where `fit` is given `initial_epoch`: `UpdateEpochStateCallback`.

It added the number of Keras's epoch to that of the state when training began. With
`fit(initial_epoch=state.epoch)` Keras's number has these epochs in it already: after a reset at
epoch 5 the state went on at 11.

https://github.com/horovod/horovod/issues/2844
"""

PATH = "horovod/_keras/elastic.py"


def mend(source):
    source.edit(
        PATH,
        "    def on_train_begin(self, logs=None):\n        self.initial_epoch = self.state.epoch\n",
        "    def on_train_begin(self, logs=None):\n"
        "        self.initial_epoch = self.state.epoch\n"
        "        self.first_epoch = None\n\n"
        "    def on_epoch_begin(self, epoch, logs=None):\n"
        "        if self.first_epoch is None:\n"
        "            self.first_epoch = epoch\n",
    )
    source.edit(
        PATH,
        "        self.state.epoch = self.initial_epoch + epoch + 1\n",
        "        self.state.epoch = self.initial_epoch + epoch - self.first_epoch + 1\n",
    )
