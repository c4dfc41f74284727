/* What Swagger UI asks the server, the description included, carries the key that the chat page keeps. */
import { getKey } from "./api.js";

const key = getKey();
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null,
  requestInterceptor: (request) => {
    if (key) request.headers.Authorization ??= `Bearer ${key}`;
    return request;
  },
});
