"""Log which process reads the weights of which checkpoint: Python loads this in all of them.

WEIGHT_READS names the file that gets a line `PID CHECKPOINT` for each time Python opens a
model.safetensors. Only verification does: tensors are loaded by the library's own code.
"""

import os
import sys


def _log(event, arguments):
    if event == "open" and str(arguments[0]).endswith("/model.safetensors"):
        checkpoint, mode = str(arguments[0]).split("/")[-2], arguments[1]
        if checkpoint.startswith("step-") and mode in ("r", "rb"):
            log = os.open(os.environ["WEIGHT_READS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{os.getpid()} {checkpoint}\n".encode())
            os.close(log)


if "WEIGHT_READS" in os.environ:
    sys.addaudithook(_log)
