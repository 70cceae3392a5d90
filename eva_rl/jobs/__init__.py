"""What the commands that compute do, in steps that hand dataclasses on: fine-tuning, pretraining, evaluation."""
