"""Reduce at once what no other tensor can join.

Horovod looks for new tensors once a cycle and sleeps in between, so that tensors which come one
after another are fused. Tensors that fill the fusion buffer alone gain nothing by it, and waited
for up to a cycle all the same; where one rank came a moment later than the others, these slept for
another. Now they end the sleep, and none begins until they are done. Meanwhile a rank waits inside
the negotiation for the others, whose own tensors wake them. With HOROVOD_FUSION_THRESHOLD=0, which
turns fusion off, this holds for each allreduce.

The pause is what users saw in https://github.com/horovod/horovod/issues/1454 and
https://github.com/horovod/horovod/pull/2468.
"""

PAUSE = """    // Ended early by what is not worth waiting for: see EnqueueTensorAllreduces.
    std::unique_lock<std::mutex> lock(state.pause_mutex);
    state.pause_end.wait_for(lock, sleep_duration,
                             [&state] { return state.not_waiting > 0; });
  }
"""
MEMBERS = """  // Ends the background thread's sleep between two cycles.
  std::mutex pause_mutex;
  std::condition_variable pause_end;
  // Calls whose tensors are not reduced yet and must not wait for others.
  std::atomic<int> not_waiting{0};

"""
MARK = """  int64_t bytes = 0;
  for (const auto& e : entries) {
    bytes += e.tensor->size();
  }
  const bool at_once =
      !horovod_global.parameter_manager.IsAutoTuning() &&
      bytes >= horovod_global.parameter_manager.TensorFusionThresholdBytes();
  if (at_once) {
    ++horovod_global.not_waiting;
    // Undone with the last of the callbacks, also where they are dropped.
    std::shared_ptr<void> mark(nullptr, [](void*) { --horovod_global.not_waiting; });
    for (auto& e : entries) {
      e.callback = [mark, done = std::move(e.callback)](const Status& status) { done(status); };
    }
  }

"""
END = """
  if (at_once) {
    { std::lock_guard<std::mutex> guard(horovod_global.pause_mutex); }
    horovod_global.pause_end.notify_one();
  }
"""


def mend(source):
    path = "horovod/common/global_state.h"
    source.edit(
        path,
        "#include <queue>\n",
        "#include <atomic>\n#include <condition_variable>\n#include <queue>\n",
    )
    anchor = "  ProcessSetTable process_set_table;\n"
    source.edit(path, anchor, MEMBERS + anchor)
    path = "horovod/common/operations.cc"
    source.edit(path, "    std::this_thread::sleep_for(sleep_duration);\n  }\n", PAUSE)
    anchor = "  // Start appropriate NVTX range\n  if (tensors.size() == 1) {\n    auto& e = entries[0];\n"
    allreduce = anchor + "    e.nvtx_op_range.Start(RegisteredNvtxOp::HorovodAllreduce,"
    source.edit(path, allreduce, MARK + allreduce)
    added = "  status = process_set.tensor_queue.AddToTensorQueueMulti(entries, messages);\n"
    source.edit(path, "\n" + added, "\n" + added + END)
