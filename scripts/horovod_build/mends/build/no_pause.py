"""Reduce at once what no other tensor can join.

Horovod looks for new tensors once a cycle and sleeps in between, so that tensors which come one
after another are fused. Tensors that fill the fusion buffer alone gain nothing by it, and waited
for up to a cycle (1 ms) all the same. They now end the sleep. With HOROVOD_FUSION_THRESHOLD=0, which
turns fusion off, each allreduce does.
"""

PAUSE = """    // Ended early by what is not worth waiting for: see EnqueueTensorAllreduces.
    std::unique_lock<std::mutex> lock(state.pause_mutex);
    state.pause_end.wait_for(lock, sleep_duration,
                             [&state] { return state.no_pause; });
  }
  {
    std::lock_guard<std::mutex> guard(state.pause_mutex);
    state.no_pause = false;
  }
"""
MEMBERS = """  // Ends the background thread's sleep between two cycles.
  std::mutex pause_mutex;
  std::condition_variable pause_end;
  bool no_pause = false;

"""
SIZE = """  int64_t bytes = 0;
  for (const auto& e : entries) {
    bytes += e.tensor->size();
  }

"""
END = """
  if (status.ok() && !horovod_global.parameter_manager.IsAutoTuning() &&
      bytes >= horovod_global.parameter_manager.TensorFusionThresholdBytes()) {
    {
      std::lock_guard<std::mutex> guard(horovod_global.pause_mutex);
      horovod_global.no_pause = true;
    }
    horovod_global.pause_end.notify_one();
  }
"""


def mend(source):
    path = "horovod/common/global_state.h"
    source.edit(path, "#include <queue>\n", "#include <condition_variable>\n#include <queue>\n")
    anchor = "  // Time point when last cycle started.\n"
    source.edit(path, anchor, MEMBERS + anchor)
    path = "horovod/common/operations.cc"
    source.edit(path, "    std::this_thread::sleep_for(sleep_duration);\n  }\n", PAUSE)
    anchor = "  // Start appropriate NVTX range\n  if (tensors.size() == 1) {\n    auto& e = entries[0];\n"
    allreduce = anchor + "    e.nvtx_op_range.Start(RegisteredNvtxOp::HorovodAllreduce,"
    source.edit(path, allreduce, SIZE + allreduce)
    added = "  status = process_set.tensor_queue.AddToTensorQueueMulti(entries, messages);\n"
    source.edit(path, "\n" + added, "\n" + added + END)
