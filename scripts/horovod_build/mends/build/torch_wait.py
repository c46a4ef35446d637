"""Let PyTorch's side sleep while it waits for a result.

`synchronize` polled for the result without a pause, taking and giving back Python's lock each time.
On a machine whose cores all compute, it took a core from the thread that reduces; ranks over Gloo,
whose transport has threads of its own, waited milliseconds for theirs. It now waits on a condition
variable.

It slept for a millisecond between two looks before https://github.com/horovod/horovod/pull/2101.
"""

WAIT = """
void HandleManager::WaitHandle(int handle) {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this, handle] {
    auto result = results_.find(handle);
    return result == results_.end() || result->second != nullptr;
  });
}

"""


def mend(source):
    path = "horovod/torch/handle_manager.h"
    source.edit(path, "#include <atomic>\n", "#include <atomic>\n#include <condition_variable>\n")
    source.edit(
        path,
        "  bool PollHandle(int handle);\n",
        "  bool PollHandle(int handle);\n"
        "  // Returns when the handle is done or unknown.\n"
        "  void WaitHandle(int handle);\n",
    )
    source.edit(
        path, "  std::mutex mutex_;\n", "  std::mutex mutex_;\n  std::condition_variable done_;\n"
    )
    path = "horovod/torch/handle_manager.cc"
    source.edit(
        path,
        "  results_[handle] = std::make_shared<Status>(status);\n}\n",
        "  results_[handle] = std::make_shared<Status>(status);\n  done_.notify_all();\n}\n" + WAIT,
    )
    source.edit(path, "  results_.clear();\n", "  results_.clear();\n  done_.notify_all();\n")
    source.edit(
        "horovod/torch/mpi_ops_v2.cc",
        "  while (true) {\n"
        "    if (handle_manager.PollHandle(handle)) break;\n"
        "    {\n"
        "      py::gil_scoped_release release_python_gil;\n"
        "      std::this_thread::yield();\n"
        "    }\n"
        "  }\n",
        "  {\n"
        "    py::gil_scoped_release release_python_gil;\n"
        "    handle_manager.WaitHandle(handle);\n"
        "  }\n",
    )
