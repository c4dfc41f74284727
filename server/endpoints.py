"""Every endpoint of the server, in the order in which they are described."""

from server.api.admin import keys, tickets, usage
from server.api.endpoint import AnyEndpoint
from server.api.openai import chat, completions, embeddings, models
from server.api.system import description, health, metrics, version
from server.api.vllm import tokenize
from server.web import docs, pages

ENDPOINTS: tuple[AnyEndpoint, ...] = (
    models.list_models,
    models.get_model,
    completions.create_completion,
    chat.create_chat_completion,
    embeddings.create_embeddings,
    tokenize.tokenize,
    tokenize.detokenize,
    usage.get_usage,
    tickets.create_ticket,
    health.health,
    health.ready,
    version.version,
    description.openapi,
    metrics.metrics,
    pages.chat_page,
    pages.dashboard_page,
    docs.docs,
    pages.page_file,
    docs.docs_file,
    keys.list_keys,
    keys.create_key,
    keys.get_key,
    keys.change_key,
    keys.revoke_key,
    keys.rotate_key,
    keys.get_key_usage,
    usage.get_all_usage,
)
