//! Chat templates: how a conversation becomes the text that a model continues.
//!
//! Templates are Jinja, as transformers renders them: blocks trimmed, Python's string methods, `raise_exception`. They
//! stand in `chat_template.jinja` or under `chat_template` in `tokenizer_config.json`.

use std::path::Path;

use dsgc_ir::diag::Diag;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value as Jinja;
use minijinja::{Environment, Error, ErrorKind, context};
use serde_json::Value;

use crate::{Folder, Tokenizer, file_error, read_object};

/// The words of a model that was never told how conversations look: those of DeepSpeed-Chat's chat.
pub const PLAIN_TEMPLATE: &str = "\
{{ bos_token }}{% for message in messages %}\
{% if message.role == 'user' %}Human: {{ message.content }}\n\nAssistant:\
{% else %} {{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}";

/// A template, and the special tokens that it names.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    text: String,
    bos: String,
    eos: String,
}

/// A part of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
}

impl ChatTemplate {
    /// A template from its text, for the special tokens of a tokenizer.
    pub fn new(text: String, tokenizer: &Tokenizer) -> ChatTemplate {
        let token = |id: Option<i32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        ChatTemplate { text, bos: token(tokenizer.bos()), eos: token(tokenizer.eos()) }
    }

    /// The text of a folder's template, if it has one.
    pub fn of_folder(folder: impl AsRef<Path>) -> Result<Option<String>, Diag> {
        let folder = Folder::check(folder.as_ref())?;
        let path = folder.join("chat_template.jinja");
        match std::fs::read_to_string(&path) {
            Ok(text) => return Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(file_error("read", &path, e)),
        }
        let config = read_object(&folder.join("tokenizer_config.json"))?;
        Ok(match config.as_ref().and_then(|c| c.get("chat_template")) {
            Some(Value::String(text)) => Some(text.clone()),
            // Several with names: `default` is the one for plain conversations.
            Some(Value::Array(all)) => {
                let default = all.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
                default.and_then(|t| t.get("template")?.as_str()).map(str::to_string)
            }
            _ => None,
        })
    }

    /// The text of a conversation up to where the assistant's next words begin.
    pub fn render(&self, messages: &[Message]) -> Result<String, Diag> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Diag::error(format!("no such syntax of templates: {e}")))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let messages: Vec<Jinja> =
            messages.iter().map(|m| context! { role => m.role, content => m.content.as_str() }).collect();
        let given = context! {
            messages,
            add_generation_prompt => true,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let rendered = environment.render_named_str("chat template", &self.text, given);
        rendered.map_err(|e| Diag::error(format!("the chat template cannot be rendered: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> ChatTemplate {
        ChatTemplate { text: text.into(), bos: "<s>".into(), eos: "</s>".into() }
    }

    fn conversation() -> Vec<Message> {
        let said = [("user", "Hello"), ("assistant", "Hi."), ("user", " How are you? ")];
        said.map(|(role, content)| Message { role, content: content.into() }).to_vec()
    }

    #[test]
    fn templates_render_as_in_transformers() {
        let found = template(PLAIN_TEMPLATE).render(&conversation()).expect("it renders");
        assert_eq!(found, "<s>Human: Hello\n\nAssistant: Hi.</s>\n\nHuman:  How are you? \n\nAssistant:");
        // Blocks on lines of their own leave nothing, methods are Python's.
        let chatml = "
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'].strip() + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}";
        let found = template(chatml).render(&conversation()[2..]).expect("it renders");
        assert_eq!(found, "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn a_template_may_refuse() {
        let refuses = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}";
        let error = template(refuses).render(&conversation()).expect_err("there are three");
        assert!(error.message.contains("one message only"), "{error}");
        let broken = template("{% for %}").render(&[]).expect_err("no template");
        assert!(broken.message.contains("chat template:1"), "{broken}");
    }

    #[test]
    fn folders_have_templates_in_either_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).expect("it is written");
        assert_eq!(ChatTemplate::of_folder(dir.path()).expect("no template is no error"), None);
        write("tokenizer_config.json", r#"{"chat_template": [{"name": "default", "template": "a"}]}"#);
        assert_eq!(ChatTemplate::of_folder(dir.path()).expect("read").as_deref(), Some("a"));
        write("tokenizer_config.json", r#"{"chat_template": "b"}"#);
        assert_eq!(ChatTemplate::of_folder(dir.path()).expect("read").as_deref(), Some("b"));
        write("chat_template.jinja", "c");
        assert_eq!(ChatTemplate::of_folder(dir.path()).expect("read").as_deref(), Some("c"));
    }
}
