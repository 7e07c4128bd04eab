"""From text to batches: sources, who holds what, tokens, memory-mapped shards, seeded batches.

::

    sources.documents -> holdings.kept_documents -> shards.build_corpus -> batches.Batches
                         tokenizer.build_vocabulary ^

Everything streams: memory does not grow with the text. Nothing here needs torch.
"""
