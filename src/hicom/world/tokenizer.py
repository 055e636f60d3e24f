"""The tokenizer that the small language model and the text tower share."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hicom.world.questions import corpus

TEXT_LENGTH = 24
SPECIAL_TOKENS = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<video>", "<image>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the world's own sentences; any other text falls back to smaller pieces and bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # No prefix space: it would be put after every special token and come back in decoded answers.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,  # an upper bound: training ends earlier, when every word of the corpus is one token
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )
