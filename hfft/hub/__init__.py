"""The result of a run on the Hugging Face Hub: may it go there, what goes, is it there."""
