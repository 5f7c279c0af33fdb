#!/bin/sh
# A model of your own: a Hugging Face directory, a .gguf file or package:NAME becomes a bundle, is checked and tuned for
# block attention on your questions.
# sh examples/own_model.sh MODEL QUESTIONS.jsonl
set -eu
blockrag bundle create "$1" bundle-untuned
blockrag bundle verify bundle-untuned
blockrag adapt block --model bundle-untuned --data "$2" --out bundle --lora-rank 32 --masks mixed --steps "${STEPS:-1000}"
echo "serve it: BLOCKRAG_BUNDLE__PATH=$PWD/bundle blockrag up"
