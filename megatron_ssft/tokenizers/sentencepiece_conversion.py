"""A SentencePiece `tokenizer.model` as a `tokenizer.json` that gives the same ids.

transformers 5 can make that conversion too, but orders the merges by id instead of by score, so that e.g. the two
spaces in `a  b` become another token than the one the model was trained with (seen with Mistral's and Llama 2's files).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssft.errors import UserError

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"  # how SentencePiece spells a space
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # ModelProto.SentencePiece.Type

PROBES = (
    "Janet's ducks lay 16 eggs; she sells 9.5 for $2 each.\nHow much?\n\n  def f(x):\n\treturn x**2  # ok",
    "Größe, naïve café, Привет мир, 数学の問題, 🦆🦆 \\frac{1}{2} <<9*2=18>>18",
    "  two leading  and   inner spaces",
    "",
)
"""Texts on which two tokenizers are compared."""


def convert_sentencepiece(model: Path, add_bos: bool, legacy: bool, where: Path) -> tokenizers.Tokenizer:
    """The tokenizer of file `model`, which messages call `where`.

    `add_bos`: asked for special tokens, it begins every text with the begin piece. `legacy` is the key of that name in
    tokenizer_config.json: the text after a special token begins with a space as the whole text does. Raises UserError
    for a damaged file, a model that is neither BPE nor unigram or has user-defined pieces, and where the result gives
    other ids than SentencePiece for PROBES.
    """
    import sentencepiece
    import tokenizers

    proto = _read(model, where)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    converted = tokenizers.Tokenizer(_model(where, proto))
    _set_text_rules(converted, proto, legacy)
    _add_special_pieces(converted, proto)
    bos = processor.bos_id()
    if add_bos and bos >= 0:
        piece = processor.id_to_piece(bos)
        converted.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{piece} $A", pair=f"{piece} $A {piece} $B", special_tokens=[(piece, bos)]
        )
    for text in PROBES:
        # Without `legacy`, transformers' own rule differs from SentencePiece's where a text begins with a space.
        text = text if legacy else text.strip()
        if converted.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(f"{where}: cannot be written as tokenizer.json with the same ids; add a tokenizer.json")
    return converted


def piece_names(model: Path) -> dict[str, str]:
    """The spellings of `bos_token`, `eos_token` and `unk_token`, where the model has them."""
    proto = _read(model, model)
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def _read(model: Path, where: Path) -> Any:
    """The ModelProto of a file."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    try:
        proto.ParseFromString(model.read_bytes())
    except DecodeError as error:
        raise UserError(f"{where}: not a SentencePiece model; copy the checkpoint again") from error
    if not proto.pieces:
        raise UserError(f"{where}: not a SentencePiece model; copy the checkpoint again")
    return proto


def _model(path: Path, proto: Any) -> tokenizers.models.Model:
    from tokenizers import models

    spec = proto.trainer_spec
    if any(p.type == _USER_DEFINED for p in proto.pieces):
        # As added tokens they would change the spaces around them.
        raise UserError(f"{path}: user-defined pieces have no exact form in tokenizer.json; add a tokenizer.json")
    if spec.model_type == _UNIGRAM:
        pieces = [(p.piece, p.score) for p in proto.pieces]
        return models.Unigram(pieces, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    if spec.model_type != _BPE:
        raise UserError(f"{path}: neither a BPE nor a unigram model; add a tokenizer.json to the checkpoint")
    return models.BPE(
        vocab={p.piece: i for i, p in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=proto.pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces whose joined text is a piece too, the joined piece with the best score first.

    That is SentencePiece's own rule: it keeps no list of merges and joins the neighbours that make the best piece.
    """
    scores = {p.piece: p.score for p in proto.pieces if p.type in (_NORMAL, _UNUSED)}
    parts = scores.keys()
    merges = []
    for piece, score in ((p.piece, p.score) for p in proto.pieces if p.type in (_NORMAL, _UNUSED)):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(-score, pair) for pair in cuts if pair[0] in parts and pair[1] in parts]
    merges.sort(key=lambda merge: merge[0])  # stable: pieces of equal score stay in the order of their ids
    return [pair for _, pair in merges]


def _set_text_rules(converted: tokenizers.Tokenizer, proto: Any, legacy: bool) -> None:
    """Normalizer, pre-tokenizer and decoder."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    rules: list[normalizers.Normalizer] = []
    prefix = spec.add_dummy_prefix
    if spec.precompiled_charsmap:
        rules.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        rules += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if legacy:
        rules += [normalizers.Prepend(_SPACE)] if prefix else []
        rules.append(normalizers.Replace(" ", _SPACE))
    else:
        scheme = "first" if prefix else "never"
        converted.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    if rules:
        converted.normalizer = normalizers.Sequence(rules)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    converted.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _add_special_pieces(converted: tokenizers.Tokenizer, proto: Any) -> None:
    """Add the pieces that SentencePiece never makes of a text, but a chat template spells."""
    from tokenizers import AddedToken

    special = [p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL)]
    converted.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
