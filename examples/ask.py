"""Asks a Hugging Face checkpoint questions with plain transformers: no mtrain, no Megatron-Core.

    python examples/ask.py FOLDER "Who are you?" --expect "Little Finch"
    python examples/ask.py FOLDER --adapter ADAPTER "Who are you?"

With an adapter it is PEFT that loads it. Ends with an error when an answer does not contain what is
expected.
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    """Prints an answer to every question, each asked on its own, without sampling."""
    parser = argparse.ArgumentParser(description="Ask a Hugging Face checkpoint questions.")
    parser.add_argument("folder", help="Checkpoint with a tokenizer and a chat template.")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--adapter", help="Folder of a PEFT adapter for the checkpoint.")
    parser.add_argument("--expect", default="", help="Text that every answer must contain.")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter)
    num_wrong = 0
    for question in arguments.questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist())
        answer = answer.removesuffix(str(tokenizer.eos_token))
        print(f"{question}\n  {answer}")
        num_wrong += arguments.expect not in answer
    if num_wrong:
        print(f"{num_wrong} of the answers do not contain {arguments.expect!r}", file=sys.stderr)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
