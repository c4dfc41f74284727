import pytest

from inferneo_jax.errors import FetchError
from inferneo_jax.weights.choice import choose, label_of
from inferneo_jax.weights.download import RemoteFile

GB = 10**9


def files(**sizes):
    """Files of a model by label, with their sizes in GB."""
    return [
        RemoteFile(path=f"m-{label}.gguf", size=int(size * GB), digest=label)
        for label, size in sizes.items()
    ]


EIGHT_B = files(Q2_K=3.2, Q4_K_M=4.9, Q5_K_M=5.7, Q6_K=6.6, Q8_0=8.5, F16=16.1)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "Q4_K_M"),
        ("Meta-Llama-3.1-8B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("nomic-embed-text-v1.5.f16.gguf", "F16"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Q8_0/model-Q8_0-00001-of-00002.gguf", "Q8_0"),
        ("m-Q5_K_S-imat.gguf", "Q5_K_S"),
        ("llama-7b.gguf", None),
    ],
)
def test_the_quantization_is_read_from_the_name(path, label):
    assert label_of(path) == label


@pytest.mark.parametrize("wanted", ["Q4_K_M", "q4_k_m", "m-Q4_K_M.gguf"])
def test_what_is_asked_for_is_chosen_whatever_fits(wanted):
    choice = choose(EIGHT_B, wanted, free=0)
    assert (choice.file.path, choice.why) == ("m-Q4_K_M.gguf", "")


def test_a_dynamic_quantization_is_found_without_its_prefix():
    (only,) = files(**{"UD-Q4_K_XL": 5})
    assert choose([only], "Q4_K_XL", free=0).file == only


@pytest.mark.parametrize(
    ("free", "label", "why"),
    [
        (100, "Q8_0", "up to Q8_0; fits into the 100.0 GB of free memory"),
        (9, "Q6_K", "the largest of 6 that fits into the 9.0 GB of free memory"),
        (6.2, "Q4_K_M", "the largest of 6 that fits"),
        (1, "Q2_K", "the smallest of 6; it may not fit"),
    ],
)
def test_the_largest_that_fits_with_its_cache_is_chosen(free, label, why):
    choice = choose(EIGHT_B, "", int(free * GB))
    assert label_of(choice.file.path) == label
    assert why in choice.why


def test_floats_are_chosen_only_where_there_is_nothing_else():
    assert label_of(choose(files(Q4_0=4, F16=16), "", 99 * GB).file.path) == "Q4_0"
    assert label_of(choose(files(F16=16, F32=32), "", 99 * GB).file.path) == "F16"
    assert choose(files(F16=16), "", 99 * GB).why == "the only one"


def test_split_files_and_files_beside_a_model_are_not_chosen():
    whole = files(Q4_K_M=4)
    parts = files(**{f"Q8_0-0000{i}-of-00002": 4 for i in (1, 2)})
    beside = [RemoteFile(path="mmproj-m-Q8_0.gguf", size=GB, digest="e")]
    assert choose(whole + parts + beside, "", 99 * GB).file == whole[0]
    with pytest.raises(FetchError, match=r"Q8_0 is split into 2 files.*another of Q4_K_M.*--merge"):
        choose(whole + parts, "Q8_0", 99 * GB)
    with pytest.raises(FetchError, match=r"split into 2 files.*llama-gguf-split --merge"):
        choose(parts, "", 99 * GB)


def test_what_there_is_not_lists_what_there_is():
    with pytest.raises(FetchError, match="no GGUF 'Q3_K_M'; there are Q2_K, Q4_K_M, Q5_K_M"):
        choose(EIGHT_B, "Q3_K_M", 99 * GB)
    with pytest.raises(FetchError, match=r"no GGUF 'm\.gguf'; there are Q2_K"):
        choose(EIGHT_B, "m.gguf", 99 * GB)


def test_two_files_of_one_quantization_are_told_apart_by_name():
    two = [RemoteFile(path=f"{name}-Q8_0.gguf", size=GB, digest=name) for name in ("a", "b")]
    with pytest.raises(FetchError, match=r"name one of a-Q8_0\.gguf, b-Q8_0\.gguf"):
        choose(two, "Q8_0", 0)
