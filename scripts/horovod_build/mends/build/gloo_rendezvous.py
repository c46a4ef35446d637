"""Let ranks meet over Gloo a second time.

Each framework's Horovod, and each `init` after a `shutdown`, has the ranks meet at horovodrun's
server, where they leave their addresses under a scope and take them away again once all have met.
The server counts who has done so, and forgot the counts of every scope when one was complete: the
scope across hosts, which on one host is complete at once, took away the count of the local one if a
rank came late. The addresses stayed, and the next meeting connected to closed ports. Each scope now
has its own count, and no rank goes on before all have taken theirs away.

Horovod's own test of a second `init` failed now and then:
https://github.com/horovod/horovod/pull/2839
"""


def mend(source):
    source.edit(
        "horovod/runner/http/http_server.py",
        "                        self.server.finished_list.clear()\n",
        "                        del self.server.finished_list[scope]\n",
    )
    source.edit(
        "horovod/common/gloo/gloo_context.cc",
        "  store->Finalize();\n  return context;\n",
        "  store->Finalize();\n"
        "  {\n"
        "    gloo::BarrierOptions opts(context);\n"
        "    opts.setTimeout(timeout);\n"
        "    gloo::barrier(opts);\n"
        "  }\n"
        "  return context;\n",
    )
