"""Tiny tokenizers that tests share, of the kinds that real models have."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

THINGS = ["tea", "rice", "bread", "soup", "rain", "snow", "a cat", "a dog", "gold", "salt"]


def trained(special):
    """A byte-level tokenizer of the tokenizers library, its special tokens first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"what is {thing} like? it is {other}, I say." for thing in THINGS for other in THINGS]
    bpe.train_from_iterator([*texts, "Human: Assistant: user system You are a helpful"], trainer)
    return bpe
