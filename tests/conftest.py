"""What all tests share."""

import signal

# A shell starts background jobs with SIGINT ignored, and their children inherit that: tests of
# Ctrl-C would wait in vain.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
