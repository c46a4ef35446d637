"""Pack the record of the build into the wheel.

The build writes horovod/_lm_build.json: what the wheel was built with, so that it can be compared
with what is installed later.
"""


def mend(source):
    source.edit(
        "setup.py",
        "      zip_safe=False,\n",
        "      zip_safe=False,\n      package_data={'horovod': ['_lm_build.json']},\n",
    )
