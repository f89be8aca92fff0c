"""Speed, memory and accuracy, side by side with the peers: one file a question, see the README in this folder."""
