"""CPU inference of language models, made for AMD EPYC."""
