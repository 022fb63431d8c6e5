"""Runs a script on gloo under `accelerate launch` with a config for FSDP or DeepSpeed, which accelerate offers on GPUs.

ACCELERATE_USE_FSDP / ACCELERATE_USE_DEEPSPEED are set by the launcher; the script follows with its arguments.
"""

import os
import runpy
import sys

from tests.distributed.workers import pretend


pretend("zero" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else "fsdp2")
sys.argv = [*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}']
runpy.run_path(sys.argv[0], run_name="__main__")
