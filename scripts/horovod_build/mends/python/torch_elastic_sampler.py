"""Let `ElasticSampler` share out what is left of an epoch when it is less than half of the ranks.

It filled up the last round of samples by as many from the beginning, and failed by an assertion
where there were not enough: after a reset near the end of an epoch one sample may be left for three
ranks. It now takes them more than once.

It is a copy of a line of torch's own sampler, which failed as it does:
https://github.com/pytorch/pytorch/issues/45324.
"""


def mend(source):
    source.edit(
        "horovod/torch/elastic/sampler.py",
        "        self.indices += self.indices[:(self.total_size - len(self.indices))]\n",
        "        while len(self.indices) < self.total_size:\n"
        "            self.indices += self.indices[:self.total_size - len(self.indices)]\n",
    )
