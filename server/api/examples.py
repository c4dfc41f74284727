"""Models of the catalog that the examples of the API's description ask for."""

CHAT_MODEL = "smollm2-135m-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"
