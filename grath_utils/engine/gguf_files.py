"""A GGUF file written as a plain model folder: bfloat16 safetensors, tokenizer, chat template.

Names, configuration and tokenizer are those that transformers itself would give the file. It would
hold all weights in memory at once, though, in 32 bits; here they are turned one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grath_utils.engine.machine import quiet_transformers
from grath_utils.errors import ModelError
from grath_utils.files import write_json

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 10**9  # a larger model is written as several files, each held in memory whole
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert_gguf(file: Path, folder: Path, *, tie: bool = False) -> None:
    """Write a model in GGUF's form into a new folder.

    Args:
        tie: write one matrix for embedding and head where the file has one for each.

    Raises:
        ModelError: the file does not hold each weight that its model has.
    """
    import torch
    from gguf import GGUFReader
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as theirs

    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with quiet_transformers():
        AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
        config = AutoConfig.from_pretrained(**place)
        config.tie_word_embeddings |= tie
        with torch.device("meta"):  # the names and shapes alone
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        config.architectures = [type(model).__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
    make = theirs.TENSOR_PROCESSORS.get(config.model_type, theirs.TensorProcessor)
    processor = make(config=config.to_dict())
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    names = theirs.get_gguf_hf_weights_map(model, processor)
    sources = {ours: found[name] for name, ours in names.items() if name in found}
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state[HEAD]
        # Of two roundings of one matrix, files of mixed precision have the finer one as the head.
        sources[EMBEDDING] = sources.pop(HEAD, sources[EMBEDDING])
    if missing := state.keys() - sources.keys():
        raise ModelError(f"{file.name} lacks {min(missing)} (of {len(missing)} weights)")
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
    for shard, weights in split.filename_to_tensors.items():
        part = {name: _bfloat16(sources[name], processor) for name in weights}
        save_file(part, folder / shard, metadata={"format": "pt"})
    if split.is_sharded:
        index: Mapping[str, Any] = {
            "metadata": split.metadata,
            "weight_map": split.tensor_to_filename,
        }
        write_json(folder / "model.safetensors.index.json", index)


def _bfloat16(tensor: Any, processor: Any) -> torch.Tensor:
    """Return a weight of a GGUF file as numbers, its rows in the order of transformers."""
    import torch
    from gguf import dequantize

    numbers = dequantize(tensor.data, tensor.tensor_type)
    return torch.tensor(processor.process(numbers, tensor.name).weights, dtype=torch.bfloat16)
