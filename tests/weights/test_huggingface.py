import json

import pytest

from inferneo_jax.errors import CheckpointError, ConfigError, TokenizerError
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.convert import convert, read_source
from inferneo_jax.weights.sources.huggingface import read_huggingface


def test_pickles_are_refused(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        read_source(folder)


def test_the_chat_template_is_found_wherever_it_lies(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    assert read_source(folder).tokenizer_config["chat_template"] is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    made.json(folder / "tokenizer_config.json", {"chat_template": named})
    assert read_source(folder).tokenizer_config["chat_template"] == "D"
    made.json(folder / "chat_template.json", {"chat_template": "J"})
    assert read_source(folder).tokenizer_config["chat_template"] == "J"
    (folder / "chat_template.jinja").write_text("X")
    assert read_source(folder).tokenizer_config["chat_template"] == "X"


def test_special_tokens_and_ends_are_gathered_from_every_file(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    made.json(folder / "tokenizer_config.json", {})
    made.json(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    made.json(folder / "generation_config.json", {"eos_token_id": [0, 1]})
    source = read_source(folder)
    assert source.tokenizer_config["eos_token"] == "</s>"
    assert source.eos_token_ids == (0, 1, 2)


def test_a_slow_tokenizer_is_made_fast(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.BERT)
    (folder / "tokenizer.json").unlink()
    made.json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (folder / "vocab.txt").write_text("\n".join(words))
    source = read_source(folder)
    vocabulary = json.loads(source.tokenizer_json)["model"]["vocab"]
    assert [vocabulary[word] for word in words] == list(range(len(words)))
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        read_source(folder)


def test_sentence_transformers_settings_are_read(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.BERT)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    made.json(folder / "modules.json", modules)
    made.json(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    made.json(folder / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    config = read_info(convert(folder, tmp_path / "out")).config
    assert (config.pooling, config.normalize, config.max_tokens) == ("cls", False, 32)
    made.json(folder / "1_Pooling" / "config.json", {"pooling_mode_max_tokens": True})
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        read_source(folder)
    modules[1]["type"] = "sentence_transformers.models.Dense"
    made.json(folder / "modules.json", modules)
    with pytest.raises(ConfigError, match="Dense"):
        read_source(folder)


def test_a_folder_without_a_vocabulary_is_refused(made, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor a vocabulary"):
        read_huggingface(folder)
