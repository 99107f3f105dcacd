import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: @triton.jit reads it

import triton_interpreter

triton_interpreter.install()
