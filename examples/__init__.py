"""Programs made with the library, each a command: shapes (`make demo`), coco (`make coco`), pretrain, crossval, and
captioning through Ray and vLLM."""
