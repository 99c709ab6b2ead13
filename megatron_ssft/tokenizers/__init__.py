"""Text to token ids and back, and the forking tokens among them.

tokenizer.py                    the interface and its three tokenizers; `build_tokenizer`
hf_folder.py                    tokenizers of Hugging Face folders; `load_tokenizer`
as_written.py                   whether transformers reads tokenizer.json as it is written
data_text.py                    text of the data, and conversations, in ids
control_tokens.py               control tokens that the data spells, as text
chat_template.py                a chat template, rendered by template_child.py within limits
rendered_parts.py               whether every part of a conversation was rendered
sentencepiece_conversion.py     a SentencePiece model as tokenizer.json with the same ids
forking_tokens.py               the ids of the tags
tag_entries.py                  the tags in an exported tokenizer
exported_tags.py                the tags of an exported model, checked against its tokenizer
"""
