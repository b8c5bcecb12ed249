"""Whether a processor computes a precision on AMX, Intel's tiles."""


def no_amx(flags: frozenset[str], precision: str) -> str:
    """Why nothing is computed on AMX, or nothing. oneDNN uses it for float32 only where TF32 or bfloat16 is allowed."""
    if "amx_tile" not in flags:
        return "the processor has no AMX, or does not say"
    needed = {"bfloat16": "amx_bf16", "float16": "amx_fp16"}.get(precision)
    if needed is None:
        return f"{precision} is not computed on AMX"
    return "" if needed in flags else f"the processor's AMX has no {precision}"
