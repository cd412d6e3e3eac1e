"""Host code of tml_kernels."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str  # the first line of its --version
    cxx_standard: int  # 201703
    build_type: str  # "release" or "debug"
    flags: str
    cuda_archs: list[str] | None  # what _cuda was built for in the same build, such as ["90a"]

def build_info() -> BuildInfo: ...
