"""A GGUF file written as a plain model folder: bfloat16 safetensors, tokenizer, chat template.

Names, configuration and tokenizer are those that transformers itself would give the file. It would
hold all weights in memory at once, though, in 32 bits; here they are turned one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grath_utils.engine.machine import quiet_transformers
from grath_utils.errors import ModelError, reason_of
from grath_utils.files import write_json

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

SHARD_BYTES = 10**9  # a larger model is written as several files, each held in memory whole
READ = ("llama", "qwen2", "qwen3")  # architectures whose every logit a test compares
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert_gguf(file: Path, folder: Path, *, tie: bool = False) -> None:
    """Write a model in GGUF's form into a new folder; ModelError if the file lacks a weight.

    With ``tie``, embedding and head are one matrix where the file has one for each.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as theirs

    reader, architecture = _opened(file)
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
    make = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
    processor = make(config=config.to_dict())
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = theirs.get_gguf_hf_weights_map(model, processor)
    sources = {ours: found[name] for name, ours in names.items() if name in found}
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state[HEAD]
        # Of two roundings of one matrix, files of mixed precision have the finer one as the head.
        sources[EMBEDDING] = sources.pop(HEAD, sources[EMBEDDING])
    if missing := state.keys() - sources.keys():
        raise ModelError(f"{file.name} lacks {min(missing)} (of {len(missing)} weights)")
    if unread := found.keys() - names.keys():  # such as the stretched positions of Llama 3.1
        raise ModelError(
            f"{file.name} holds {min(unread)} (of {len(unread)} weights), which transformers does "
            "not read, so its model would be another one; get it as *.safetensors"
        )
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD_BYTES)
    for shard, weights in split.filename_to_tensors.items():
        part = {name: _bfloat16(sources[name], processor) for name in weights}
        for name, weight in part.items():
            if weight.shape != state[name].shape:
                shapes = f"{[*weight.shape]}, expected {[*state[name].shape]}"
                raise ModelError(f"{file.name}: {name} has the shape {shapes}")
        save_file(part, folder / shard, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _opened(file: Path) -> tuple[GGUFReader, str]:
    """Return what reads a file, and its architecture; what would come out wrong is refused."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import read_field

    try:
        reader = GGUFReader(file)
    except Exception as error:  # numpy's, Python's and its own
        raise ModelError(f"{file.name} is no whole GGUF file ({reason_of(error)})") from error

    def said(key: str, default: Any) -> Any:
        return next(iter(read_field(reader, key)), default)

    architecture = said("general.architecture", "unnamed")
    if (kind := said("general.type", "model")) != "model":
        raise ModelError(f"{file.name} is a GGUF file of the kind {kind}, not a model")
    if (parts := said("split.count", 1)) > 1:
        raise ModelError(
            f"{file.name} is one of {parts} parts: join them first (llama-gguf-split --merge)"
        )
    if architecture not in READ:
        raise ModelError(
            f"{file.name} holds a model of the architecture {architecture}, and of GGUF files only "
            f"{', '.join(READ)} are read (mistral is a llama there); get it as *.safetensors"
        )
    if (scaling := said(f"{architecture}.rope.scaling.type", "none")) != "none":
        raise ModelError(
            f"{file.name} stretches positions ({scaling}), which transformers does not read from "
            "GGUF files; get the model as *.safetensors"
        )
    return reader, architecture


def _bfloat16(tensor: Any, processor: Any) -> torch.Tensor:
    """Return a weight of a GGUF file as numbers, its rows in the order of transformers."""
    import torch
    from gguf import dequantize

    numbers = dequantize(tensor.data, tensor.tensor_type)
    return torch.tensor(processor.process(numbers, tensor.name).weights, dtype=torch.bfloat16)
