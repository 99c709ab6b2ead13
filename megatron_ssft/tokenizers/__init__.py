"""Text to token ids and back, and the forking tokens among them.

tokenizer.py                    the interface and its three tokenizers; `build_tokenizer`
hf_folder.py                    tokenizers of Hugging Face folders; `load_tokenizer`
sentencepiece_conversion.py     a SentencePiece model as tokenizer.json with the same ids
forking_tokens.py               the ids of the tags
tag_entries.py                  the tags in an exported tokenizer
exported_tags.py                the tags of an exported model, checked against its tokenizer
"""
