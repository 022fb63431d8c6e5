"""Click prediction: logs that are streamed, the DLRM, and its scores."""
