"""Run as a program: download a Hugging Face model and print where it lies.

`python -m gateway.launch.fetch <org/name>`; never imported by the gateway.
"""

import sys

from huggingface_hub import snapshot_download

# weights in one format only, and nothing executable
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


if __name__ == "__main__":
    sys.stdout.write(str(snapshot_download(sys.argv[1], allow_patterns=WANTED)) + "\n")
